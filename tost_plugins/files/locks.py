"""One process at a time in a folder, also when they are on several machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


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
