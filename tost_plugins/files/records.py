"""Pickles of other programs as plain records: every class and function in them is a name, and nothing of it is run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from tost_plugins.files.pickles import check_pickle


class Record:
    """What a pickle says of an object: its class's `module` and `name`, the `args` it is made with, the `state` it is given.
    Each load has classes of its own, so that a file can spoil nothing but what it says itself."""

    module = name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_records(content: bytes, stored: Callable[[Any], Any] | None = None) -> Any:
    """The content of a pickle, with records for all objects; `stored` gives what its persistent ids stand for.

    Raises what `pickle` raises for a torn one, and `pickles.Suspect` for one that would take memory or time without end.

    Example:
        >>> import datetime
        >>> found = read_records(pickle.dumps({"waited": datetime.timedelta(1)}))
        >>> found["waited"].module, found["waited"].name, found["waited"].args
        ('datetime', 'timedelta', (1, 0, 0))
    """
    check_pickle(io.BytesIO(content), strict=True)
    return _Reader(content, stored).load()


class _Reader(pickle.Unpickler):
    def __init__(self, content: bytes, stored: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(content))
        self._stored, self._classes = stored, {}

    def find_class(self, module: str, name: str) -> type[Record]:
        """A record's class of this name."""
        if (module, name) not in self._classes:
            self._classes[module, name] = type(name, (Record,), {"module": module, "name": name})
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """What the number of a storage stands for."""
        if self._stored is None:
            raise pickle.UnpicklingError("it asks for what is not in it")
        return self._stored(pid)
