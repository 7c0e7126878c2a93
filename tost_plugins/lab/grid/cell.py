"""One run of a grid: what it is, its folder, and its record once it is done."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write
from tost_plugins.lab.grid.starts import shuffled, start_with_signs
from tost_plugins.lab.lottery import lottery
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.superpose import Cycles, superpose
from tost_plugins.lab.train import train
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training import seeds

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a grid, in a folder of its own, `name`.

    `labels` say what it is in the grid's own words, and stand in front of its results; a cell without any is there for
    others only. With a `parent`, a cell that comes before it, the run has that one's final mask, or with `shuffle` a
    random one with as many weights in each layer; with `constant_sign` its weights start with one magnitude a layer. A
    recipe with a lottery_ticket is trained round by round, one with `cycles` as `tost superpose` does. `measure(folder,
    recipe, **options)` returns rows about the finished run; it is a function of a module, since cells travel to other
    processes.
    """

    name: str
    recipe: Recipe
    labels: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    shuffle: bool = False
    constant_sign: bool = False
    cycles: Cycles | None = None
    measure: Callable[..., list[dict[str, Any]]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All that its result depends on, in primitives."""
        measure = f"{self.measure.__module__}.{self.measure.__name__}" if self.measure else None
        start = {"parent": self.parent, "shuffle": self.shuffle, "constant_sign": self.constant_sign}
        start |= {} if self.cycles is None else {"cycles": asdict(self.cycles)}
        described = {"recipe": self.recipe.to_dict(), **start, "measure": measure, "options": self.options}
        return json.loads(json.dumps(described))


def run_cell(cell: Cell, out: Path, listen: Listener = silent) -> None:
    """Run one cell in this process, unless it is done; its record is in its folder then."""
    if record_of(cell, out) is not None:
        return
    folder = out / cell.name
    watch, mask = _Stopwatch(listen), _structure(cell, out)
    try:
        if isinstance(cell.recipe.mask, LotteryTicket):
            lottery(cell.recipe, folder, True, watch)
        elif cell.cycles is not None:
            superpose(cell.recipe, folder, cell.cycles, True, watch)
        else:
            train(cell.recipe, folder, True, mask, watch, initial=start_with_signs if cell.constant_sign else None)
        rows = cell.measure(last_run(folder), cell.recipe, **cell.options) if cell.measure else []
    except TostError as error:
        raise error.at(cell.name) from None
    record = {"cell": cell.described(), "rows": rows, "seconds": watch.total(), "step_seconds": watch.step()}
    write(folder / "cell.json", json.dumps(record, indent=1))


def last_run(folder: Path) -> Path:
    """The folder of a cell's run; of a lottery ticket, that of its last round."""
    rounds = sorted(folder.glob("round-*"))
    return rounds[-1] if rounds else folder


def record_of(cell: Cell, out: Path) -> Record | None:
    """The record of a cell that is done; None for another, a TostError where the folder has one of other settings."""
    folder = out / cell.name
    if not (folder / "cell.json").exists():
        return None
    record = json.loads((folder / "cell.json").read_text())
    if _settings(record["cell"]) != _settings(cell.described()):
        raise TostError(
            f"--out {out}: expected results of these settings, got {cell.name} of others; choose another folder"
        )
    result = json.loads((last_run(folder) / "result.json").read_text())
    return {**record, "name": cell.name, "labels": cell.labels, "result": result, "folder": last_run(folder)}


def _settings(described: dict[str, Any]) -> dict[str, Any]:
    """What a cell is, whatever its recipe is called and was read from."""
    recipe = {key: value for key, value in described["recipe"].items() if key not in ("name", "source")}
    return {**described, "recipe": recipe}


def _structure(cell: Cell, out: Path) -> Mask | None:
    """The mask that a cell takes over, kept in its folder too."""
    if cell.parent is None:
        return None
    mask = Mask.load(last_run(out / cell.parent) / "mask.safetensors")
    if cell.shuffle:
        mask = shuffled(mask, seeds.generator(cell.recipe.seed, 1))
    mask.save(out / cell.name / "structure.safetensors")
    return mask


class _Stopwatch:
    """Passes a run's events on, and measures how long it and its steps take."""

    def __init__(self, listen: Listener) -> None:
        self.listen, self.began, self.before = listen, time.perf_counter(), 0.0
        self.steps: list[float] = []

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        now = time.perf_counter()
        if event == "step" and values["step"] > 1:
            self.steps.append(now - self.before)
        self.listen(event, values)
        self.before = time.perf_counter()

    def total(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> float | None:
        """The mean time of a step, without the slowest twentieth, which evaluate and save."""
        quick = sorted(self.steps)[: len(self.steps) - len(self.steps) // 20]
        return statistics.mean(quick) if quick else None
