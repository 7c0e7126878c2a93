"""`tost reproduce`: the tables of "Training Your Sparse Neural Network Better with Any Mask" beside our own runs."""

from __future__ import annotations

import csv
import importlib.resources
import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError, unknown
from tost_plugins.files.atomic import write
from tost_plugins.lab import grid
from tost_plugins.lab.job import Listener
from tost_plugins.lab.report import Plot, study_figure, write_csv
from tost_plugins.lab.studies import registry as studies
from tost_plugins.lab.studies.base import Content, Row, Size, on_one_mask
from tost_plugins.lab.studies.training import alone
from tost_plugins.lab.train import environment
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.recipe.recipe import apply_changes, read


@dataclass(frozen=True)
class Protocol:
    """How long and on what a table is run: `changes` of its recipe, where `data` and `optimizer` only change what they
    name; `tweaks`, in place of the recipe's, for the tables that train with and without them; `masks`, options of mask
    methods; which masks and sparsities there are unless `--masks` and `--sparsities` say so; and the size of the
    studies that tables of single tweaks are."""

    about: str
    changes: Row = field(default_factory=dict)
    tweaks: list[Row] | None = None
    masks: Mapping[str, Row] = field(default_factory=dict)
    only_masks: tuple[str, ...] = ()
    only_sparsities: tuple[float, ...] = ()
    size: Size = "paper"


PROTOCOLS: dict[str, Protocol] = {
    "full": Protocol("as published: 182 epochs, batch 128, on all images (the shipped recipes)"),
    "short": Protocol(
        "a GPU in minutes: 20 epochs, batch 512, bf16, on all images",
        {
            "duration": "20ep", "precision": "bf16", "data": {"batch_size": 512}, "optimizer": {"lr": 0.2},
            "schedule": {"kind": "steps", "at": ["10ep", "15ep"], "factor": 0.1, "warmup": "1ep"},
        },
        masks={"lottery_ticket": {"prune": 0.632}},
    ),
    "cpu": Protocol(
        "a CPU in hours: ResNet-20 on 20,000 images of 16 px, 12 epochs, batch 64, bf16",
        {
            "model": "cifar/resnet20", "duration": "12ep", "precision": "bf16", "schedule": {"kind": "cosine"},
            "data": {"limit": 20_000, "validation": 500, "batch_size": 64, "image_size": 16},
        },
        tweaks=[
            {"kind": "ghost_skip", "until": "0.1dur"}, {"kind": "soft_activation", "until": "0.1dur"},
            {"kind": "rescaled_init", "iterations": 60, "learning_rate": 0.01},
            {"kind": "label_smoothing", "alpha": 0.05},
        ],
        masks={"snip": {"batches": 2}, "lottery_ticket": {"prune": 0.632}},
        only_masks=("random", "snip", "synflow"), only_sparsities=(95, 98), size="cpu",
    ),
}  # fmt: skip


def _with_and_without(content: Content) -> dict[str, Row]:
    return {"plain": {"tweaks": []}, "tost": {}}


def _ablation(content: Content) -> dict[str, Row]:
    return {"plain": {"tweaks": []}, **alone(content), "tost": {}}


def _ghosts(content: Content) -> dict[str, Row]:
    return {"plain": {"tweaks": []}, **{k: v for k, v in alone(content).items() if k in _GHOSTS}}


@dataclass(frozen=True)
class Table:
    """A table of the paper, or one block of it: whose published numbers they are, and what of ours stands beside them.

    `recipe` has our network and data at the full protocol, in place of those of the shipped recipe, or of a `study` that
    looks at the same; `variants(content)` are the trainings on each mask, the plain one first.
    """

    number: int
    model: str
    dataset: str
    recipe: Row
    variants: Callable[[Content], dict[str, Row]] = _with_and_without
    study: str | None = None
    note: str = ""

    @property
    def about(self) -> str:
        """What is published, in words."""
        model = f"{self.model} (table body)" if self.note == _WHICH else self.model
        return f"table {self.number}, {model} on {self.dataset}"


_GHOSTS = ("ghost_skip", "soft_activation")
_RECIPE = "cifar10_random_90"  # the shipped ones differ in their masks only
_WIDE = "The published ResNet-32 is the one of doubled widths (32-64-128), as ours."
_WHICH = "The table's body says ResNet-50, its caption ResNet-18; ours is cifar/resnet18."
_CIFAR100 = {"data": {"name": "cifar100"}}
_RESNET18 = {"model": "cifar/resnet18", **_CIFAR100}
TABLES: dict[str, Table] = {
    "table2": Table(2, "ResNet-32", "CIFAR-10", {}, note=_WIDE),
    "table2-cifar100": Table(2, "ResNet-32", "CIFAR-100", _CIFAR100, note=_WIDE),
    "table2-resnet50": Table(2, "ResNet-50", "CIFAR-10", {"model": "cifar/resnet18"}, note=_WHICH),
    "table2-resnet50-cifar100": Table(2, "ResNet-50", "CIFAR-100", _RESNET18, note=_WHICH),
    "table3": Table(
        3, "ResNet-50", "TinyImageNet",
        {"model": "torchvision/resnet50", "data": {"name": "folder", "image_size": 64}},
        note="The images are a folder of yours: --set data.path=FOLDER.",
    ),
    "table4": Table(4, "ResNet-18", "CIFAR-100", _RESNET18, _ablation, "ablation"),
    "table5": Table(
        5, "ResNet-18", "CIFAR-100", _RESNET18, _ghosts, "density-benefit",
        note="Published are gains only. At 0 % ours is dense training, without a ticket.",
    ),
}  # fmt: skip


def published(name: str) -> list[Row]:
    """The published numbers of a table: a row for each mask, sparsity (percent) and training other than the plain one.

    `plain` and `with_tweaks` are accuracies in percent (None in table 5, which has gains only), `difference` their
    difference in points.

    Example:
        >>> published("table2")[0]["difference"]
        1.58
    """
    table = _table(name)
    if table.number == 5:
        return _published_gains()
    found = [
        row
        for row in _shipped("tost_accuracy.csv")
        if (int(row["table"]), row["model"], row["dataset"]) == (table.number, table.model, table.dataset)
    ]
    accuracy = {
        (row["mask"], row["sparsity_percent"], row["training"]): float(row["accuracy_percent"]) for row in found
    }
    rows = []
    for (mask, sparsity, training), value in accuracy.items():
        if training != "plain":
            plain = accuracy[mask, sparsity, "plain"]
            numbers = {"plain": plain, "with_tweaks": value, "difference": round(value - plain, 2)}
            rows.append({"mask": mask, "sparsity": int(sparsity), "training": training, **numbers})
    return rows


def _published_gains() -> list[Row]:
    rows = []
    for row in (row for row in _shipped("tost_other.csv") if row["table"] == "5"):
        training = row["quantity"].removeprefix("gain of ").removesuffix(" (points)")
        for sparsity, gain in zip(row["column"].split("|"), row["value"].split("|"), strict=True):
            numbers = {"plain": None, "with_tweaks": None, "difference": float(gain)}
            where = {"mask": "lottery_ticket", "sparsity": int(sparsity.removesuffix(" %")), "training": training}
            rows.append({**where, **numbers})
    return rows


def cells(
    name: str,
    protocol: str = "short",
    masks: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    changes: Sequence[str] = (),
    seeds: int = 3,
) -> list[grid.Cell]:
    """The runs of a table, seed after seed, so that a part of them is the table with fewer seeds.

    `masks` and `sparsities` (percent) keep those only; `changes` are `key.sub=value` of every recipe. Raises TostError
    for what the table does not have, and for what a recipe does not take.
    """
    table, how = _table(name), _protocol(protocol)
    if seeds < 1:
        raise TostError(f"--seeds: expected at least 1, got {seeds}; 3 or more say something about the spread")
    places = list(dict.fromkeys((row["mask"], row["sparsity"]) for row in published(name)))
    chosen = _chosen("--masks", "mask", name, masks, how.only_masks, [mask for mask, _ in places])
    dense_to_sparse = _chosen(
        "--sparsities", "sparsity", name, sparsities, how.only_sparsities, [sparsity for _, sparsity in places]
    )
    made: list[grid.Cell] = []
    for seed in range(seeds):
        for mask, sparsity in places:
            if mask in chosen and sparsity in dense_to_sparse:
                content = _content(table, how, mask, sparsity, changes)
                labels = {"mask": mask, "sparsity": sparsity}
                made += on_one_mask(content, [seed], f"{mask}-{sparsity}-", table.variants(content), labels)
    return made


def run(
    name: str,
    out: str | Path,
    protocol: str = "short",
    masks: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    changes: Sequence[str] = (),
    seeds: int = 3,
    jobs: int = 1,
    listen: Listener | None = None,
    train: bool = True,
) -> dict[str, Any]:
    """Run a table in `out`: its cells, then NAME.csv, NAME.json and NAME.png there; returns what NAME.json holds.

    Cells that are finished are not run again, and one that was stopped goes on; other processes may work in the same
    folder. Without `train` the table is of what is finished so far. Raises TostError where that is nothing.
    """
    out, made = Path(out), cells(name, protocol, masks, sparsities, changes, seeds)
    records = grid.run(made, out, jobs, listen=listen) if train else grid.finished(made, out)
    rows = beside(name, records)
    if not rows:
        raise TostError(
            f"--out {out}: expected finished runs with and without tweaks, got none; leave --finished away, or wait"
        )
    table, ours = TABLES[name], f"{studies.title(records)}, protocol {protocol}"
    result = {
        "study": name, "about": f"ours beside {table.about}", "size": protocol, "title": ours,
        "paper": f"Jaiswal et al., ICML 2022, {table.about}. {table.note}".strip(),
        "command": command(name, out, protocol, masks, sparsities, changes, seeds), "summary": rows,
        "left": len(made) - len(records), "recipes": {cell.name: cell.recipe.to_dict() for cell in made},
        "environment": environment(), "seconds": sum(record["seconds"] for record in records),
    }  # fmt: skip
    with grid.alone(out, wait=True):  # all processes end with the last cell
        write_csv(out / f"{name}.csv", rows)
        _figure(name, records, rows, ours, out / f"{name}.png")
        write(out / f"{name}.json", json.dumps(result, indent=1))
    return result


def plan(made: Sequence[grid.Cell], out: str | Path, jobs: int = 1) -> dict[str, Any]:
    """`grid.outlook`, with the number of `trainings` in all cells: a lottery ticket is one for each round."""
    tickets = [cell.recipe.mask.sparsities() for cell in made if isinstance(cell.recipe.mask, LotteryTicket)]
    return {**grid.outlook(made, out, jobs), "trainings": len(made) + sum(len(rounds) - 1 for rounds in tickets)}


def beside(name: str, records: Sequence[grid.Record]) -> list[Row]:
    """A row for each published one that has runs of ours on a seed with and without tweaks.

    Ours are means and standard deviations (0 for one seed) over the seeds; those of the `difference` are of the paired
    differences, one for each seed. `difference_of_differences` is ours less the published one, all in points.
    """
    rows = []
    for known in published(name):
        pairs = _pairs(records, known)
        if pairs:
            row = {**{key: known[key] for key in ("mask", "sparsity", "training")}, "seeds": len(pairs)}
            for key, values in zip(("plain", "with_tweaks"), zip(*pairs.values(), strict=True), strict=True):
                row |= _mean_std(key, values)
            row |= _mean_std("difference", [changed - plain for plain, changed in pairs.values()])
            row |= {f"published_{key}": known[key] for key in ("plain", "with_tweaks", "difference")}
            rows.append({**row, "difference_of_differences": row["difference"] - known["difference"]})
    return rows


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows as text for a terminal: ours as mean (std), gains with their sign, nothing where nothing is published."""
    several = len({row["training"] for row in rows}) > 1
    made = []
    for row in rows:
        training = {"training": row["training"]} if several else {}
        ours = {key: f"{row[key]:.2f} ({row[key + '_std']:.2f})" for key in ("plain", "with_tweaks")}
        gain = {"gain": f"{row['difference']:+.2f} ({row['difference_std']:.2f})"}
        theirs = {f"paper {key}": _number(row[f"published_{key}"]) for key in ("plain", "with_tweaks")}
        theirs |= {"paper gain": f"{row['published_difference']:+.2f}"}
        last = {"gain less paper's": f"{row['difference_of_differences']:+.2f}"}
        made.append({"mask": f"{row['mask']} {row['sparsity']} %", **training, **ours, **gain, **theirs, **last})
    return made


def notes(result: Mapping[str, Any]) -> list[str]:
    """What stands below the table: whose numbers they are, and what cannot be compared."""
    left = f"; {result['left']} runs are not done yet" if result["left"] else ""
    return [
        f"ours: {result['title']}{left}",
        f"published: {result['paper']}",
        "Another network, data or length makes other accuracies: compare the differences then, and their signs.",
    ]


def listed(values: Sequence[str]) -> list[str]:
    """The names in options that may be repeated and may hold several, with commas between them."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def percents(values: Sequence[str]) -> list[float]:
    """`listed`, as numbers."""
    try:
        return [float(value) for value in listed(values)]
    except ValueError:
        raise TostError(f"--sparsities: expected percents, got {', '.join(values)!r}; write 95,98") from None


def command(
    name: str, out: Path, protocol: str, masks: Sequence[str], sparsities: Sequence[float], changes: Sequence[str],
    seeds: int,
) -> str:  # fmt: skip
    """What to type to get this again."""
    parts = ["tost", "reproduce", name, "--protocol", protocol, "--seeds", str(seeds)]
    parts += ["--masks", ",".join(masks)] if masks else []
    parts += ["--sparsities", ",".join(f"{sparsity:g}" for sparsity in sparsities)] if sparsities else []
    return shlex.join([*parts, *(part for change in changes for part in ("--set", change)), "--out", str(out)])


def _table(name: str) -> Table:
    if name not in TABLES:
        raise unknown("tost reproduce", "table", name, TABLES)
    return TABLES[name]


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise unknown("--protocol", "protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def _chosen(where: str, what: str, name: str, given: Sequence[Any], usual: Sequence[Any], known: list[Any]) -> set[Any]:
    """Which of the published ones are run: those given, else the protocol's own as far as the table has them, else all."""
    for value in given:
        if value not in known:
            names = dict.fromkeys(f"{each:g}" if isinstance(each, (int, float)) else each for each in known)
            raise unknown(where, f"{what} of {name}", value, names)
    return set(given) or (set(usual) & set(known)) or set(known)


def _content(table: Table, how: Protocol, mask: str, sparsity: float, changes: Sequence[str]) -> Row:
    """The recipe's content with all its tweaks, for one place of a table."""
    content: Row = studies.content_of(table.study, how.size) if table.study else read(_RECIPE)
    for change in (table.recipe, how.changes):
        inner = {key: {**content.get(key, {}), **change[key]} for key in ("data", "optimizer") if key in change}
        content = {**content, **change, **inner}
    if how.tweaks is not None and table.study is None:
        content["tweaks"] = how.tweaks
    kind = mask if sparsity else "random"  # a dense network needs no ticket
    spec = {"kind": kind, "sparsity": sparsity / 100, "on_collapse": "keep_one", **how.masks.get(kind, {})}
    changed = apply_changes({**content, "mask": spec}, list(changes))
    if any(changed["mask"].get(key) != spec[key] for key in ("kind", "sparsity")):
        raise TostError(
            f"--set: expected changes of other keys than the mask's kind and sparsity, got {changed['mask']}; "
            f"use --masks and --sparsities"
        )
    return changed


def _pairs(records: Sequence[grid.Record], known: Row) -> dict[int, tuple[float, float]]:
    """Seed -> test accuracy without tweaks, and with those of a published row."""

    def by_seed(training: str) -> dict[int, float]:
        wanted = {"mask": known["mask"], "sparsity": known["sparsity"], "training": training}
        return {
            r["labels"]["seed"]: r["result"]["test_accuracy"] for r in records if wanted.items() <= r["labels"].items()
        }

    plain, changed = by_seed("plain"), by_seed(known["training"])
    return {seed: (plain[seed], changed[seed]) for seed in plain if seed in changed}


def _mean_std(key: str, values: Sequence[float]) -> Row:
    return {key: statistics.mean(values), f"{key}_std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _figure(name: str, records: Sequence[grid.Record], rows: Sequence[Row], ours: str, path: Path) -> None:
    """Our gains, with their spread over seeds, and the published ones, a panel for each mask or training."""
    points = []
    for row in rows:
        place = {key: row[key] for key in ("mask", "training")} | {"sparsity": f"{row['sparsity']} %"}
        gains = [changed - plain for plain, changed in _pairs(records, row).values()]
        points += [{**place, "whose": "ours", "gain": gain} for gain in gains]
        points.append({**place, "whose": "published", "gain": row["published_difference"]})
    panel = "training" if len({row["training"] for row in rows}) > 1 else "mask"
    plot = Plot("sparsity", "gain", by="whose", panel=panel, xlabel="sparsity", ylabel="gain (points)", zero=True)
    study_figure(points, plot, f"what the tweaks add to the test accuracy, beside {TABLES[name].about}", ours, path)


def _shipped(name: str) -> list[dict[str, str]]:
    """The rows of one of the files with published numbers."""
    file = importlib.resources.files("tost_plugins.lab") / "published" / name
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
