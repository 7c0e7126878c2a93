"""What a study is: which runs, which rows come out of them, and how they are drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import Plot
from tost_plugins.recipe.recipe import Recipe

Row = dict[str, Any]
Size = Literal["smoke", "cpu", "paper"]
Content = Mapping[str, Any]  # a recipe's content, with the user's changes

_STEPS = {"schedule": {"kind": "steps", "at": ["90ep", "135ep"], "factor": 0.1}, "duration": "182ep"}
_SNIP = {"kind": "snip", "sparsity": 0.95, "batches": 2, "on_collapse": "keep_one"}


def tweaks(iterations: int, learning_rate: float = 0.02, alpha: float = 0.05) -> list[Row]:
    """The four tweaks as the shipped recipes have them, with this much of rescaled_init."""
    return [
        {"kind": "ghost_skip", "until": "0.1dur"},
        {"kind": "soft_activation", "until": "0.1dur"},
        {"kind": "rescaled_init", "iterations": iterations, "learning_rate": learning_rate},
        {"kind": "label_smoothing", "alpha": alpha},
    ]


#: What a study of each size trains, unless it says otherwise; `--set` changes it.
BASES: dict[str, Row] = {
    "smoke": {
        "mask": _SNIP, "tweaks": tweaks(2), "model": "cifar/resnet8", "duration": "3ep", "trainer": "torch",
        "data": {"name": "digits", "limit": 384, "batch_size": 64},
    },
    "cpu": {
        "mask": _SNIP, "tweaks": tweaks(30), "model": "cifar/resnet20", "duration": "4ep", "trainer": "torch",
        "data": {"name": "cifar10", "limit": 5000, "validation": 500, "batch_size": 64}, "precision": "bf16",
    },
    "paper": {
        "mask": {"kind": "lottery_ticket", "sparsity": 0.9, "prune": 0.2, "rewind": "0ba"},
        "tweaks": tweaks(180, 1e-3, 0.1), "model": "cifar/resnet18", "trainer": "torch", **_STEPS,
        "data": {"name": "cifar100", "batch_size": 128},
    },
}  # fmt: skip
#: What the second paper trains: CIFAR-10, and its methods.
STRUCTURES = {"tweaks": [], "data": {"name": "cifar10", "batch_size": 128}}
SEEDS: dict[str, int] = {"smoke": 1, "cpu": 3, "paper": 3}


@dataclass(frozen=True)
class Study:
    """One figure or table of a paper, from its grid to its picture.

    `cells(content, size, seeds)` is the grid; `rows(records, size)` its results, with the keys that `plot` names.
    `base` changes the recipe of a size before the user does. `about` is one line, `paper` says where the original is and
    what it shows.
    """

    about: str
    paper: str
    plot: Plot
    cells: Callable[[Content, Size, Sequence[int]], list[Cell]]
    rows: Callable[[Sequence[Record], Size], list[Row]]
    base: Mapping[str, Row] | None = None


def cell(content: Content, name: str, seed: int, labels: Row, changes: Row | None = None, **rest: Any) -> Cell:
    """One run of the recipe `content` with `changes`; `labels` and the seed stand in front of its results."""
    made = {**content, **(changes or {}), "seed": content.get("seed", 0) + seed, "name": f"{name} (seed {seed})"}
    folder = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    return Cell(f"{folder}-seed{seed}", Recipe.from_dict(made), labels | {"seed": seed} if labels else {}, **rest)


def on_one_mask(
    content: Content, seeds: Iterable[int], prefix: str, variants: Mapping[str, Row], labels: Row, **options: Any
) -> list[Cell]:
    """For each seed the variants (name -> changes of the recipe) on one mask; `options` are those of their cells.

    A lottery ticket is found first, without tweaks; other masks are the same by their seed.
    """
    made = []
    for seed in seeds:
        changed, rest = dict(content), {}
        if content["mask"]["kind"] == "lottery_ticket":
            ticket = cell(content, f"{prefix}ticket", seed, {}, {"tweaks": []})
            made.append(ticket)
            changed["mask"], rest = FROM_PARENT, {"parent": ticket.name}
        for name, changes in variants.items():
            made.append(
                cell(changed, f"{prefix}{name}", seed, {**labels, "training": name}, changes, **options, **rest)
            )
    return made


#: The recipe's mask of a cell that has a parent: the file is kept beside its run.
FROM_PARENT: Row = {"kind": "file", "path": "structure.safetensors", "on_collapse": "keep_one"}


def accuracies(records: Sequence[Record], size: Size) -> list[Row]:
    """A row for each run that has labels: they, its test accuracy in percent and its sparsity."""
    return [
        {**r["labels"], "test_accuracy": r["result"]["test_accuracy"], "sparsity_reached": r["result"]["sparsity"]}
        for r in records
        if r["labels"]
    ]


def watched(record: Record, measure: str) -> list[Row]:
    """What a run has seen of itself, with its labels; numbers are numbers, and what was not there is left out."""
    with (record["folder"] / "watch" / f"{measure}.csv").open(newline="", encoding="utf-8") as file:
        return [
            {**record["labels"], **{k: _number(v) for k, v in row.items() if v != ""}} for row in csv.DictReader(file)
        ]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
