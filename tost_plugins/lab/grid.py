"""A grid of runs, one after another or side by side: finished cells are not run again, a stopped one goes on."""

from __future__ import annotations

import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write
from tost_plugins.lab.job import Listener, Stopped
from tost_plugins.lab.lottery import lottery
from tost_plugins.lab.studies.reinit import constant_sign, shuffled
from tost_plugins.lab.train import check_out, train
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training import seeds
from tost_plugins.training.params import prunable

Record = dict[str, Any]

_BUSY = 75  # the exit status of a cell's process that found another one at it
_PAUSE = 1.0  # seconds between two looks at cells that other processes are running


@dataclass(frozen=True)
class Cell:
    """One run of a grid, in a folder of its own, `name`.

    `labels` say what it is in the grid's own words, and stand in front of its results; a cell without any is there for
    others only. With a `parent`, a cell that comes before it, the run has that one's final mask, or with `shuffle` a
    random one with as many weights in each layer; with `constant_sign` its weights start with one magnitude a layer.
    A recipe with a lottery_ticket is trained round by round. `measure(folder, recipe, **options)` returns rows about
    the finished run; it is a function of a module, since cells travel to other processes.
    """

    name: str
    recipe: Recipe
    labels: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    shuffle: bool = False
    constant_sign: bool = False
    measure: Callable[..., list[dict[str, Any]]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All that its result depends on, in primitives."""
        measure = f"{self.measure.__module__}.{self.measure.__name__}" if self.measure else None
        start = {"parent": self.parent, "shuffle": self.shuffle, "constant_sign": self.constant_sign}
        described = {"recipe": self.recipe.to_dict(), **start, "measure": measure, "options": self.options}
        return json.loads(json.dumps(described))


def run(
    cells: Sequence[Cell], out: str | Path, jobs: int = 1, resume: bool = True, listen: Listener | None = None
) -> list[Record]:
    """Run all cells in `out`, up to `jobs` side by side, each then a process of its own; their records, in order.

    A record holds `labels`, `result` (what `train` returns, without histories), `rows` (of the cell's measure),
    `folder` (of the run, or of the last round), `seconds` (of the last go) and `step_seconds`. After each cell
    `listen("cell", {...})` is called. Without `resume` a folder that holds a run is an error; so is, always, one
    that holds another recipe's. Raises Stopped after Ctrl-C, when all that was running has written its checkpoint.

    Several processes, on several machines, may run the same cells in one folder: each leaves a cell that another is
    running for later, and all return every record.
    """
    out, listen = Path(out), listen or (lambda event, values: None)
    if jobs < 1:
        raise TostError(f"--jobs: expected at least 1, got {jobs}; 1 runs one cell after another")
    for cell in cells if not resume else ():
        check_out(out / cell.name, cell.recipe, resume=False)
    records = [_finished(cell, out) for cell in cells]
    left = [cell for cell, record in zip(cells, records, strict=True) if record is None]
    told = _Told(listen, len(cells), len(left), jobs)
    if jobs > 1:
        _side_by_side(left, out, jobs, told)
    else:
        _one_after_another(left, out, listen, told)
    return finished(cells, out)


def finished(cells: Sequence[Cell], out: str | Path) -> list[Record]:
    """The records of the cells that are done, in order."""
    return [record for cell in cells if (record := _finished(cell, Path(out))) is not None]


def outlook(cells: Sequence[Cell], out: str | Path, jobs: int = 1) -> dict[str, Any]:
    """How many cells there are, how many are left, and about how many seconds they take (None before the first)."""
    records = [_finished(cell, Path(out)) for cell in cells]
    took, left = [record["seconds"] for record in records if record], records.count(None)
    return {"cells": len(cells), "left": left, "seconds": statistics.mean(took) * left / jobs if took else None}


def run_cell(cell: Cell, out: Path, listen: Listener | None = None) -> Record | None:
    """Run one cell in this process; its record, or None where another process is running it."""
    folder = out / cell.name
    with alone(folder) as mine:
        if not mine:
            return None
        if (found := _finished(cell, out)) is not None:
            return found
        watch, mask = _Stopwatch(listen), _structure(cell, out)
        try:
            if isinstance(cell.recipe.mask, LotteryTicket):
                lottery(cell.recipe, folder, True, watch)
            else:
                train(cell.recipe, folder, True, mask, watch, initial=_signs if cell.constant_sign else None)
            rows = cell.measure(last_run(folder), cell.recipe, **cell.options) if cell.measure else []
        except TostError as error:
            raise error.at(cell.name) from None
        record = {"cell": cell.described(), "rows": rows, "seconds": watch.total(), "step_seconds": watch.step()}
        write(folder / "cell.json", json.dumps(record, indent=1))
        return _finished(cell, out) or record


def last_run(folder: Path) -> Path:
    """The folder of a cell's run; of a lottery ticket, that of its last round."""
    rounds = sorted(folder.glob("round-*"))
    return rounds[-1] if rounds else folder


def _finished(cell: Cell, out: Path) -> Record | None:
    folder = out / cell.name
    if not (folder / "cell.json").exists():
        return None
    record = json.loads((folder / "cell.json").read_text())
    if record["cell"] != cell.described():
        raise TostError(
            f"--out {out}: expected results of these settings, got {cell.name} of others; choose another folder"
        )
    result = json.loads((last_run(folder) / "result.json").read_text())
    return {**record, "name": cell.name, "labels": cell.labels, "result": result, "folder": last_run(folder)}


def _structure(cell: Cell, out: Path) -> Mask | None:
    """The mask that a cell takes over, kept in its folder too."""
    if cell.parent is None:
        return None
    mask = Mask.load(last_run(out / cell.parent) / "mask.safetensors")
    if cell.shuffle:
        mask = shuffled(mask, seeds.generator(cell.recipe.seed, 1))
    mask.save(out / cell.name / "structure.safetensors")
    return mask


@torch.no_grad()
def _signs(model: nn.Module, mask: Mask | None) -> None:
    weights = prunable(model)
    for name, value in constant_sign(weights, mask or Mask.dense(weights)).items():
        weights[name].copy_(value)


@contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[bool]:
    """One process at a time works in a folder: whether this one may, which `wait` makes sure of. Another may be on
    another machine, or that of a cell of a grid that was killed, which is still running by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        yield _locked(file, wait)  # closing the file, also by dying, lets go of it


def _locked(file: TextIO, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: nobody else is kept out
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Stopwatch:
    """Passes a run's events on, and measures how long it and its steps take."""

    def __init__(self, listen: Listener | None) -> None:
        self.listen, self.began, self.before = listen or (lambda event, values: None), time.perf_counter(), 0.0
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


class _Told:
    """Says after each cell how far the grid is, and about how long it still takes."""

    def __init__(self, listen: Listener, total: int, left: int, jobs: int) -> None:
        self.listen, self.total, self.left, self.jobs, self.took = listen, total, left, jobs, []

    def __call__(self, record: Record) -> None:
        self.took.append(record["seconds"])
        self.left -= 1
        seconds = statistics.mean(self.took) * self.left / self.jobs
        place = {"done": self.total - self.left, "total": self.total, "seconds_left": seconds}
        self.listen("cell", {"name": record["name"], "seconds": record["seconds"], **place})


def _one_after_another(cells: Sequence[Cell], out: Path, listen: Listener, told: _Told) -> None:
    """All cells in this process, those first that no other one is running."""
    left = {cell.name: cell for cell in cells}
    while left:
        before = len(left)
        for cell in list(left.values()):
            record = None if cell.parent in left else run_cell(cell, out, listen)
            if record is not None:
                del left[cell.name]
                told(record)
        if len(left) == before:
            time.sleep(_PAUSE)


def _side_by_side(cells: Sequence[Cell], out: Path, jobs: int, told: _Told) -> None:
    """Each cell in a process of its own, which is asked once to stop at Ctrl-C, and then writes its checkpoint."""
    left = {cell.name: cell for cell in cells}
    futures: dict[Future[Record | None], Cell] = {}
    processes: dict[str, subprocess.Popen] = {}

    def one(cell: Cell) -> Record | None:
        record = _in_a_process(cell, out, jobs, processes)
        if record is None:
            time.sleep(_PAUSE)
        return record

    with ThreadPoolExecutor(jobs) as pool:
        try:
            while left:
                running = {cell.name for cell in futures.values()}
                ready = [cell for cell in left.values() if cell.name not in running and cell.parent not in left]
                for cell in ready[: jobs - len(futures)]:
                    futures[pool.submit(one, cell)] = cell
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    cell, record = futures.pop(future), future.result()
                    del left[cell.name]
                    if record is None:
                        left[cell.name] = cell  # again, after the others
                    else:
                        told(record)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            if isinstance(error, KeyboardInterrupt):
                raise Stopped("stopped; what was running has written its checkpoint") from None
            raise


def _in_a_process(cell: Cell, out: Path, jobs: int, processes: dict[str, subprocess.Popen]) -> Record | None:
    """What `run_cell` returns, in a process that is put into `processes` while it runs."""
    with alone(out / cell.name) as mine:
        if not mine:
            return None
    if (found := _finished(cell, out)) is not None:
        return found
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    process = processes[cell.name] = subprocess.Popen(
        [sys.executable, "-m", "tost_plugins.lab.grid", str(out)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env={"OMP_NUM_THREADS": threads, **os.environ}, start_new_session=True,
    )  # fmt: skip
    said = process.communicate(pickle.dumps(cell))[1].decode(errors="replace").strip()
    if process.returncode == _BUSY:
        return None
    if process.returncode == 130:
        raise Stopped(f"stopped in {cell.name}")
    if process.returncode:
        raise TostError(said.rpartition("\n")[2] or f"{cell.name}: its process ended with {process.returncode}")
    return _finished(cell, out)


def _serve() -> None:
    """A cell's own process: the cell comes in as a pickle from the process that started it."""
    try:
        if run_cell(pickle.load(sys.stdin.buffer), Path(sys.argv[1])) is None:
            sys.exit(_BUSY)
    except (Stopped, KeyboardInterrupt):
        sys.exit(130)
    except TostError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _serve()
