"""What a terminal shows while runs go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tost_plugins.errors import one_line

#: What a run tells while it goes on: ("run", {...}), ("step", {...}), ("epoch", {...}); many of them also "cell",
#: "failed" and "again", or "round".
Listener = Callable[[str, dict[str, Any]], None]


def silent(event: str, values: dict[str, Any]) -> None:
    """The listener that shows nothing."""


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A progress bar on stderr that follows the steps of one run after another, and a line for each epoch."""
    if quiet:
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def listen(event: str, values: dict[str, Any]) -> None:
            if event == "run":
                name = one_line(values["name"])  # a recipe's own text: neither markup nor codes of a terminal
                bar.console.print(
                    f"{name}: {values['model']} on {values['data']}, {values['total']} steps, {values['trainer']}",
                    highlight=False,
                    markup=False,
                )
                bar.reset(task, total=values["total"], description=escape(name))
            elif event == "step":
                bar.update(task, completed=values["step"], total=values["total"])
            elif event == "cell":
                left = f", about {duration(values['seconds_left'])} left" if values["done"] < values["total"] else ""
                text = f"{values['done']} of {values['total']}: {values['name']}, {duration(values['seconds'])}{left}"
                bar.console.print(text, highlight=False, markup=False)
                bar.reset(task, total=values["total"], completed=values["done"], description="runs")
            elif event == "failed":
                bar.console.print(f"failed: {values['said']}", highlight=False, markup=False)
            elif event == "again":
                text = f"{values['said']}; it goes on from its checkpoint (go {values['go']} of {values['of']})"
                bar.console.print(text, highlight=False, markup=False)
            elif event == "round":
                shown = {
                    key: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for key, value in values.items()
                }
                text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
                bar.console.print(text, highlight=False, markup=False)
            elif event == "epoch":
                bar.update(task, description=f"epoch {values['epoch']:g}  accuracy {values['accuracy']:.2f}")

        yield listen


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would take."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
