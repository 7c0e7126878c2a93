"""Our numbers beside the published ones: as rows, as text, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tost_plugins.lab.grid import Record
from tost_plugins.lab.report import Plot, mean_std, study_figure
from tost_plugins.lab.reproduce.tables import TABLES, published
from tost_plugins.lab.studies.base import Row


def beside(name: str, records: Sequence[Record]) -> list[Row]:
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


def draw(name: str, records: Sequence[Record], rows: Sequence[Row], ours: str, path: Path) -> None:
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


def _pairs(records: Sequence[Record], known: Row) -> dict[int, tuple[float, float]]:
    """Seed -> test accuracy without tweaks, and with those of a published row."""

    def by_seed(training: str) -> dict[int, float]:
        wanted = {"mask": known["mask"], "sparsity": known["sparsity"], "training": training}
        return {
            r["labels"]["seed"]: r["result"]["test_accuracy"] for r in records if wanted.items() <= r["labels"].items()
        }

    plain, changed = by_seed("plain"), by_seed(known["training"])
    return {seed: (plain[seed], changed[seed]) for seed in plain if seed in changed}


def _mean_std(key: str, values: Sequence[float]) -> Row:
    return dict(zip((key, f"{key}_std"), mean_std(values), strict=True))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
