"""Cells side by side, each in a process of its own, or one after another in this one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tost_plugins.errors import TostError
from tost_plugins.files.locks import alone
from tost_plugins.lab.grid.cell import Cell, Record, record_of, run_cell
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.progress import Listener

BUSY = 75  # the exit status of a cell's process that found another one at it
_PAUSE = 1.0  # seconds between two looks at cells that other processes are running


def one_after_another(cells: Sequence[Cell], out: Path, listen: Listener, told: Callable[[Record], None]) -> None:
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


def side_by_side(cells: Sequence[Cell], out: Path, jobs: int, told: Callable[[Record], None]) -> None:
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
    if (found := record_of(cell, out)) is not None:
        return found
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    process = processes[cell.name] = subprocess.Popen(
        [sys.executable, "-m", "tost_plugins.lab.grid", str(out)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env={"OMP_NUM_THREADS": threads, **os.environ}, start_new_session=True,
    )  # fmt: skip
    said = process.communicate(pickle.dumps(cell))[1].decode(errors="replace").strip()
    if process.returncode == BUSY:
        return None
    if process.returncode == 130:
        raise Stopped(f"stopped in {cell.name}")
    if process.returncode:
        raise TostError(said.rpartition("\n")[2] or f"{cell.name}: its process ended with {process.returncode}")
    return record_of(cell, out)
