"""Rows -> rich table, CSV, matplotlib figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_COLOURS = {"plain": "#777777", "tost": "#0b6e99"}
_LABELS = {"plain": "plain sparse training", "tost": "with ToST"}


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows with the same keys; numbers are right-aligned, floats have two digits."""
    made = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        made.add_column(key.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        made.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    return made


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, with a header of all their keys; the folder is made, and the file is whole whenever it is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def comparison_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each seed, then mean and standard deviation, of what `compare` returns."""
    summary = [{"seed": name, **result[key]} for name, key in (("mean", "mean"), ("std", "std"))]
    return [{**row, "seed": str(row["seed"])} for row in (*result["rows"], *summary)]


def comparison_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Accuracy over the epochs with and without ToST, a line per seed and their mean; alpha and beta below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    for variant in ("plain", "tost"):
        runs = [run for run in result["runs"] if run["variant"] == variant]
        lines = [[row["accuracy"] for row in run["history"]] for run in runs]
        epochs = [row["epoch"] for row in runs[0]["history"]]
        for line in lines if len(lines) > 1 else ():
            upper.plot(epochs, line, color=_COLOURS[variant], linewidth=0.8, alpha=0.35)
        mean = [sum(values) / len(values) for values in zip(*lines, strict=True)]
        style = {"color": _COLOURS[variant], "linewidth": 2.2, "linestyle": "--" if variant == "plain" else "-"}
        upper.plot(epochs, mean, label=_LABELS[variant], **style)
    recipe, runs, seeds = result["recipe"], result["runs"], len(result["rows"])
    upper.set_ylabel("accuracy (%)")
    upper.set_title(
        f"{recipe['model']} on {recipe['data']['name']}, {recipe['mask']['kind']} at {runs[0]['sparsity']:.0%}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, {recipe['trainer']}", fontsize=10,
    )  # fmt: skip
    upper.legend(loc="lower right", frameon=False)
    _schedules(lower, next(run for run in runs if run["variant"] == "tost")["curves"])
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(path), dpi=150)


def _schedules(axes: Any, curves: Sequence[Mapping[str, float]]) -> None:
    epochs = [0.0, *(point["epoch"] for point in curves)]
    axes.set_xlabel("epoch")
    if "tost/ghost_skip/alpha" in curves[0]:
        alpha = [1.0, *(point["tost/ghost_skip/alpha"] for point in curves)]
        axes.plot(epochs, alpha, color="#0b6e99", label="alpha of the ghost skips (0: gone)")
        axes.set_ylabel("alpha", color="#0b6e99")
        axes.set_ylim(-0.05, 1.05)
    if "tost/soft_activation/beta" in curves[0]:
        right = axes.twinx()
        soft = [p for p in curves if p["tost/soft_activation/active"]]
        right.plot([p["epoch"] for p in soft], [p["tost/soft_activation/beta"] for p in soft], color="#b5541c",
                   linestyle="-.", label="beta of the soft activations")  # fmt: skip
        if soft and soft[-1]["epoch"] < epochs[-1]:
            right.axvline(soft[-1]["epoch"], color="#b5541c", linewidth=0.8, alpha=0.6)
            right.annotate("ReLU again", (soft[-1]["epoch"], 1), (4, 2), textcoords="offset points", color="#b5541c")
        right.set_ylabel("beta", color="#b5541c")
        right.spines["top"].set_visible(False)
