"""Cells side by side in processes of this machine, which stay warm from one cell to the next."""

from __future__ import annotations

import _thread
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch

from tost_plugins.lab.grid.cell import Cell
from tost_plugins.lab.grid.order import Engine, Outcome, attempt

_stop_asked = False  # in a process of the pool: no cell begins any more


class Pool(Engine):
    """Up to `jobs` cells side by side. Each process is a pool of its own, so that one that dies takes only its cell along."""

    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.jobs = out, jobs
        self.idle, self.running = list[_Process](), dict[Future[Outcome], tuple[Cell, _Process]]()

    def room(self) -> int:
        return self.jobs

    at_once = room

    def start(self, cell: Cell) -> None:
        process = self.idle.pop() if self.idle else self._process()
        with _unheard():
            try:
                future = process.pool.submit(_work, cell, self.out)
            except BrokenProcessPool:  # it has died since its last cell
                process.close()
                process = self._process()
                future = process.pool.submit(_work, cell, self.out)
            self.running[future] = cell, process

    def _process(self) -> _Process:
        return _Process(max(1, (os.cpu_count() or 1) // self.jobs))

    def ended(self) -> list[tuple[Cell, Outcome]]:
        found = []
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            cell, process = self.running.pop(future)
            try:
                found.append((cell, future.result()))
                self.idle.append(process)
            except BrokenProcessPool:
                process.close()
                found.append((cell, Outcome("died", f"{cell.name}: its process died")))
        return found

    def stop(self) -> None:
        for _, process in self.running.values():
            process.stop()
        wait(self.running)

    def close(self) -> None:
        for process in self.idle:
            process.close()
        for future, (_, process) in self.running.items():
            process.close() if future.done() else process.cut_off()


class _Process:
    """One process, and the way to tell it to stop, which it notices as well when this process dies."""

    def __init__(self, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.hears, self.says = spawn.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, spawn, _begin, (self.hears, threads))

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it has died meanwhile
            self.says.send_bytes(b"stop")

    def close(self) -> None:
        """End it, after its last cell: what it has imported may have to clean up."""
        self.pool.shutdown()
        self.says.close()
        self.hears.close()

    def cut_off(self) -> None:
        """End it in the middle of a cell."""
        self.says.close()
        self.pool.shutdown(cancel_futures=True)
        self.hears.close()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Around the start of a process: it will not hear the terminal's Ctrl-C, since it is told over its pipe, and does not run
    the caller's script once more, which may have no `if __name__ == "__main__"`."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _begin(hears: Connection, threads: int) -> None:
    """What a process does before its first cell: it is silent, has its share of the cores, and listens."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    threading.Thread(target=_listen, args=(hears,), daemon=True).start()


def _listen(hears: Connection) -> None:
    """Stop when asked to, and end at once where the process that it works for is gone, or waits no longer."""
    global _stop_asked
    while True:
        try:
            hears.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        _stop_asked = True
        _thread.interrupt_main()


def _work(cell: Cell, out: Path) -> Outcome:
    """A cell, in a process of the pool."""
    outcome = interruptible(cell, out)
    if torch.cuda.is_initialized():  # others share the device
        gc.collect()
        torch.cuda.empty_cache()
    return outcome


def interruptible(cell: Cell, out: Path) -> Outcome:
    """A cell in a process that somebody else may interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return Outcome("stopped") if _stop_asked else attempt(cell, out)
    except KeyboardInterrupt:
        return Outcome("stopped")
    finally:
        signal.signal(signal.SIGINT, before)
