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
from tost_plugins.lab.grid.cluster import Cluster, Ray
from tost_plugins.lab.grid.order import Engine, Here, run_all
from tost_plugins.lab.grid.pool import Pool
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.train import check_out, environment
from tost_plugins.training.params import some


def run(
    cells: Sequence[Cell], out: str | Path, jobs: int | Cluster = 1, resume: bool = True, listen: Listener = silent
) -> list[Record]:
    """Run all cells in `out`: one after another in this process, up to `jobs` side by side in processes of their own, or on
    a Ray `Cluster`; their records, in order.

    A record holds `labels`, `result` (what `train` returns, without histories), `rows` (of the cell's measure),
    `folder` (of the run, or of the last round), `seconds` (of the last go) and `step_seconds`. `listen("cell", {...})` is
    called after each cell. A cell whose process dies is begun again (`listen("again", {...})`) and goes on from its
    checkpoint, three times in all. A cell that fails (`listen("failed", {...})`) leaves the others alone, but for those
    that it is the parent of. Without `resume` a folder that holds a run is an error; so is, always, one that holds another
    recipe's, or that another process works in. Raises a TostError in the end if a cell has failed, and Stopped after
    Ctrl-C, when all that was running has written its checkpoint.
    """
    out = Path(out)
    if not isinstance(jobs, Cluster) and jobs < 1:
        raise TostError(f"--jobs: expected at least 1, got {jobs}; 1 runs one cell after another")
    with alone(out):
        for cell in cells if not resume else ():
            check_out(out / cell.name, cell.recipe, resume=False)
        records = [record_of(cell, out) for cell in cells]
        left = [cell for cell, record in zip(cells, records, strict=True) if record is None]
        failed = _run(left, out, jobs, len(cells), listen) if left else {}
    if len(failed) == 1:
        raise TostError(next(iter(failed.values())))
    if failed:
        raise TostError(
            f"--out {out}: expected {len(left)} runs to end well, got {len(failed)} that failed "
            f"({some(list(failed.values()), 1)}); the same command runs those again"
        )
    return finished(cells, out)


def _run(left: Sequence[Cell], out: Path, jobs: int | Cluster, total: int, listen: Listener) -> dict[str, str]:
    """Run the cells that are left of `total`; returns those that failed, and why."""
    took: list[float] = []

    def done(cell: Cell) -> None:
        record = record_of(cell, out) or {"seconds": 0.0}
        took.append(record["seconds"])
        still = len(left) - len(took)
        seconds = statistics.mean(took) * still / engine.at_once()
        place = {"done": total - still, "total": total, "seconds_left": seconds}
        listen("cell", {"name": cell.name, "seconds": record["seconds"], **place})

    engine: Engine
    if isinstance(jobs, Cluster):
        engine = Ray(out, jobs)
    else:
        engine = Pool(out, jobs) if jobs > 1 else Here(out, listen)
    return run_all(left, engine, done, listen)


def finished(cells: Sequence[Cell], out: str | Path) -> list[Record]:
    """The records of the cells that are done, in order."""
    return [record for cell in cells if (record := record_of(cell, Path(out))) is not None]


def outlook(cells: Sequence[Cell], out: str | Path, jobs: int | Cluster = 1) -> dict[str, Any]:
    """How many cells there are, how many are left, and about how many seconds they take (None before the first); of a cluster
    only its `jobs` are known before it is asked."""
    records = [record_of(cell, Path(out)) for cell in cells]
    took, left = [record["seconds"] for record in records if record], records.count(None)
    at_once = jobs if isinstance(jobs, int) else jobs.jobs or 1
    return {"cells": len(cells), "left": left, "seconds": statistics.mean(took) * left / at_once if took else None}


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
    for stem, rows in tables.items():
        write_csv(out / f"{stem}.csv", rows)
    draw(out / f"{name}.png")
    write(out / f"{name}.json", json.dumps(left, indent=1))
    return left
