"""All cells of a grid: which are done, running those that are left, and what they have come to."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write, write_csv
from tost_plugins.files.locks import alone
from tost_plugins.lab.grid.cell import Cell, Record, record_of
from tost_plugins.lab.grid.processes import one_after_another, side_by_side
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.train import check_out, environment


def run(
    cells: Sequence[Cell], out: str | Path, jobs: int = 1, resume: bool = True, listen: Listener = silent
) -> list[Record]:
    """Run all cells in `out`, up to `jobs` side by side, each then a process of its own; their records, in order.

    A record holds `labels`, `result` (what `train` returns, without histories), `rows` (of the cell's measure),
    `folder` (of the run, or of the last round), `seconds` (of the last go) and `step_seconds`. After each cell
    `listen("cell", {...})` is called. Without `resume` a folder that holds a run is an error; so is, always, one
    that holds another recipe's. Raises Stopped after Ctrl-C, when all that was running has written its checkpoint.

    Several processes, on several machines, may run the same cells in one folder: each leaves a cell that another is
    running for later, and all return every record.
    """
    out = Path(out)
    if jobs < 1:
        raise TostError(f"--jobs: expected at least 1, got {jobs}; 1 runs one cell after another")
    for cell in cells if not resume else ():
        check_out(out / cell.name, cell.recipe, resume=False)
    records = [record_of(cell, out) for cell in cells]
    left = [cell for cell, record in zip(cells, records, strict=True) if record is None]
    took: list[float] = []

    def told(record: Record) -> None:
        took.append(record["seconds"])
        still = len(left) - len(took)
        place = {"done": len(cells) - still, "total": len(cells), "seconds_left": statistics.mean(took) * still / jobs}
        listen("cell", {"name": record["name"], "seconds": record["seconds"], **place})

    if jobs > 1:
        side_by_side(left, out, jobs, told)
    else:
        one_after_another(left, out, listen, told)
    return finished(cells, out)


def finished(cells: Sequence[Cell], out: str | Path) -> list[Record]:
    """The records of the cells that are done, in order."""
    return [record for cell in cells if (record := record_of(cell, Path(out))) is not None]


def outlook(cells: Sequence[Cell], out: str | Path, jobs: int = 1) -> dict[str, Any]:
    """How many cells there are, how many are left, and about how many seconds they take (None before the first)."""
    records = [record_of(cell, Path(out)) for cell in cells]
    took, left = [record["seconds"] for record in records if record], records.count(None)
    return {"cells": len(cells), "left": left, "seconds": statistics.mean(took) * left / jobs if took else None}


def seed_range(count: int, first: int = 0) -> range:
    """`count` seeds from `first` on; raises TostError for none."""
    if count < 1:
        raise TostError(f"--seeds: expected at least 1, got {count}; 3 or more say something about the spread")
    return range(first, first + count)


def command(words: Sequence[str], changes: Sequence[str], out: Path) -> str:
    """What to type to get a grid again."""
    return shlex.join([*words, *(part for change in changes for part in ("--set", change)), "--out", str(out)])


def leave(
    out: Path,
    name: str,
    cells: Sequence[Cell],
    records: Sequence[Record],
    tables: Mapping[str, Sequence[Record]],
    draw: Callable[[Path], None],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Write what a grid has come to: its `tables` by their names, what `draw` draws, and NAME.json, which is returned:
    `result`, with the recipes, versions and seconds behind it."""
    seconds = sum(record["seconds"] for record in records)
    recipes = {cell.name: cell.recipe.to_dict() for cell in cells}
    left = {"study": name, **result, "recipes": recipes, "environment": environment(), "seconds": seconds}
    with alone(out, wait=True):  # all processes in a folder end with its last cell
        for stem, rows in tables.items():
            write_csv(out / f"{stem}.csv", rows)
        draw(out / f"{name}.png")
        write(out / f"{name}.json", json.dumps(left, indent=1))
    return left
