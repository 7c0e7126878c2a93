"""What a study is: which runs, which rows come out of them, and how they are drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.job import Job
from tost_plugins.lab.report import Plot
from tost_plugins.lab.studies.settings import Content, Row, Size
from tost_plugins.lab.train import prepare
from tost_plugins.recipe.recipe import Recipe


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


def alone(content: Content, kinds: Sequence[str] | None = None) -> dict[str, Row]:
    """Name -> changes of a recipe: without tweaks, and with each of them (of these `kinds`) alone."""
    chosen = [tweak for tweak in content["tweaks"] if kinds is None or tweak["kind"] in kinds]
    return {"plain": {"tweaks": []}, **{tweak["kind"]: {"tweaks": [tweak]} for tweak in chosen}}


def on_one_mask(
    content: Content, seeds: Iterable[int], variants: Mapping[str, Row], place: Row | None = None, **options: Any
) -> list[Cell]:
    """For each seed the variants (name -> changes of the recipe) on one mask; `options` are those of their cells.

    `place` are labels that all of them have; its values begin their names. A lottery ticket is found first, without
    tweaks; other masks are the same by their seed.
    """
    made, place = [], place or {}
    prefix = "".join(f"{value}-" for value in place.values())
    for seed in seeds:
        changed, rest = dict(content), {}
        if content["mask"]["kind"] == "lottery_ticket":
            ticket = cell(content, f"{prefix}ticket", seed, {}, {"tweaks": []})
            made.append(ticket)
            changed["mask"], rest = FROM_PARENT, {"parent": ticket.name}
        for name, changes in variants.items():
            labels = {**place, "training": name}
            made.append(cell(changed, f"{prefix}{name}", seed, labels, changes, **options, **rest))
    return made


#: The recipe's mask of a cell that has a parent: the file is kept beside its run.
FROM_PARENT: Row = {"kind": "file", "path": "structure.safetensors", "on_collapse": "keep_one"}


def ended(folder: Path, recipe: Recipe) -> Job:
    """A finished run's data and loader, and its network as it was left."""
    job = prepare(recipe, folder)
    job.model.load_state_dict(load_file(folder / "model.safetensors"))
    return job


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
