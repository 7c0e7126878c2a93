"""Rows -> rich table, CSV, matplotlib figure."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tost_plugins.errors import one_line
from tost_plugins.files.atomic import replacing
from tost_plugins.files.atomic import write_csv as write_csv

_COLOURS = {"plain": "#777777", "tost": "#0b6e99"}
_LABELS = {"plain": "plain sparse training", "tost": "with ToST"}


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows with the same keys; numbers are right-aligned, floats have two digits. Nothing is cut off: what is too long
    for the terminal goes on in the next line, but for the first column, which says what to type."""
    made = Table(title=Text(one_line(title)), title_justify="left")
    for key, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        made.add_column(key.replace("_", " "), justify=justify, no_wrap=not made.columns, overflow="fold")
    for row in rows:
        made.add_row(*(Text(f"{v:.2f}" if isinstance(v, float) else one_line(str(v))) for v in row.values()))
    return made


def comparison_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each seed, then mean and standard deviation, of what `compare` returns."""
    summary = [{"seed": name, **result[key]} for name, key in (("mean", "mean"), ("std", "std"))]
    return [{**row, "seed": str(row["seed"])} for row in (*result["rows"], *summary)]


def comparison_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Accuracy over the epochs with and without ToST, a line per seed and their mean; alpha and beta below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
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
        _lighten(axes)
    save_figure(figure, path)


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


@dataclass(frozen=True)
class Plot:
    """How rows are drawn: `y` over `x`, a line for each `by`, an axis for each `panel`; text on x is one place for each."""

    x: str
    y: str
    by: str | None = None
    panel: str | None = None
    xlabel: str = ""
    ylabel: str = ""
    zero: bool = False  # a line at 0
    log: bool = False  # a logarithmic y axis
    chance: str | None = None  # a column with what chance would give: a thin line of its means
    least: float = 0.0  # the height that the y axis has at least: differences below it are none


def summary(rows: Sequence[Mapping[str, Any]], plot: Plot) -> list[dict[str, Any]]:
    """A row for each point of a plot: mean and standard deviation (0 for one row) of y, and how many rows there are.

    Example:
        >>> summary([{"p": 1, "a": 2.0}, {"p": 1, "a": 4.0}], Plot("p", "a"))
        [{'p': 1, 'a': 3.0, 'std': 1.4142135623730951, 'n': 2}]
    """
    keys = [key for key in (plot.panel, plot.by, plot.x) if key is not None]
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row[plot.y])
    return [
        dict(zip([*keys, plot.y, "std", "n"], [*group, *mean_std(values), len(values)], strict=True))
        for group, values in groups.items()
    ]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation (0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


#: Colour (each of another lightness, so that grey will do), line and marker of the lines of a figure.
_STYLES = [
    ("#0b3954", "-", "o"), ("#c8553d", "--", "s"), ("#7fb069", "-.", "^"), ("#8d6a9f", ":", "D"), ("#e6a117", "-", "v"),
    ("#5c9ead", "--", "P"), ("#444444", "-.", "X"),
]  # fmt: skip


def study_figure(rows: Sequence[Mapping[str, Any]], plot: Plot, title: str, subtitle: str, path: str | Path) -> None:
    """Draw rows as `plot` says, mean and spread (standard deviation over seeds and draws), and save a PNG."""
    from matplotlib.figure import Figure

    points = summary(rows, plot)
    panels = list(dict.fromkeys(point[plot.panel] for point in points)) if plot.panel else [None]
    lines = list(dict.fromkeys(point[plot.by] for point in points)) if plot.by else [None]
    across = min(len(panels), 2) if len(panels) != 3 else 3
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.9 * across + 1.6 * (across == 1), 3.3 * down + 1.0), layout="constrained")
    places = figure.subplots(down, across, squeeze=False, sharey=bool(plot.ylabel)).flat
    for axes, panel in zip(places, panels, strict=False):
        here = [point for point in points if not plot.panel or point[plot.panel] == panel]
        for number, line in enumerate(lines):
            mine = [point for point in here if not plot.by or point[plot.by] == line]
            _line(axes, mine, plot, line, _STYLES[number % len(_STYLES)], (number - (len(lines) - 1) / 2) * 0.12)
        if plot.chance:
            mine = [row for row in rows if not plot.panel or row[plot.panel] == panel]
            _by_chance(axes, summary(mine, Plot(plot.x, plot.chance)))
        axes.set_title("" if panel is None else str(panel), fontsize=9)
        _tidy(axes, plot)
    figure.suptitle(f"{textwrap.fill(title, 45 * across + 20)}\n{subtitle}".strip(), fontsize=9)
    if plot.by:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        across = min(len(handles), 2 * across)
        figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False, fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure, as the kind of picture that its name ends with."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix.removeprefix(".") or "png")


def _line(axes: Any, points: Sequence[Mapping[str, Any]], plot: Plot, label: Any, style: tuple, aside: float) -> None:
    colour, dash, marker = style
    x, y, std = ([point[key] for point in points] for key in (plot.x, plot.y, "std"))
    if not x:
        return
    if isinstance(x[0], str):
        places = [place + aside for place in range(len(x))]
        axes.errorbar(places, y, std, color=colour, marker=marker, linestyle="none", capsize=3, label=label)
        axes.set_xticks(range(len(x)), [textwrap.fill(text.replace("_", " "), 12) for text in x], fontsize=8)
        axes.margins(x=0.12)
        return
    marked = {} if len(x) > 25 else {"marker": marker, "markersize": 4}
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.5, label=label, **marked)
    low, high = ([a + sign * s for a, s in zip(y, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _lighten(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_chance(axes: Any, means: Sequence[Mapping[str, Any]]) -> None:
    x, y = zip(*sorted(list(point.values())[:2] for point in means), strict=True)
    axes.plot(x, y, color="#000000", linewidth=0.9, dashes=(1, 2), label="by chance")


def _tidy(axes: Any, plot: Plot) -> None:
    axes.set_xlabel(plot.xlabel, fontsize=9)
    axes.set_ylabel(plot.ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    _lighten(axes)
    if plot.log:
        axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high - low < plot.least:
        axes.set_ylim(low - 0.05 * plot.least, low + plot.least)
    if plot.zero:
        axes.axhline(0, color="#444444", linewidth=0.8)
