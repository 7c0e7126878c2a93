"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tost_plugins.errors import TostError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made, as long as this one is in it; it may die and lets go of it.

    Raises TostError where another one is in it. On Windows, and on a file system without locks, nobody is kept out.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with alone(folder):  # doctest: +ELLIPSIS
        ...     with alone(folder):
        ...         pass
        Traceback (most recent call last):
        tost_plugins.errors.TostError: --out ...: expected a folder that no other process works in, got one that is in use; ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:  # closing it lets go
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TostError(
                f"--out {folder}: expected a folder that no other process works in, got one that is in use; wait for "
                f"that one, or choose another folder"
            ) from None
        except (ImportError, OSError):
            pass
        yield
