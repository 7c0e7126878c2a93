"""Reading a user's loader without a trace: once for all looks of a start, and everything that it moved is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from tost_plugins.errors import TostError
from tost_plugins.training import rng
from tost_plugins.training.batches import is_empty, length, to_device

_END = object()
_DEEPEST, _LONGEST = (
    8,
    64,
)  # how far generators are looked for, and the longest list that may hold some: others hold data


class Batches:
    """What looks see of a loader: its batches on one device, from the first with samples on, as often as they like.

    Within `with batches:`, which may be nested, the first batches, which `take` has given, are kept for the next look, and
    the others read as they are asked for. On leaving, the loader, its samplers and all random generators are as they
    were. Reading has random numbers of its own, so that a look sees the same whatever has looked before it.

    Example:
        >>> batches = Batches([torch.zeros(2), torch.ones(2)], torch.device("cpu"))
        >>> batches.take(1), len(list(batches))
        ([tensor([0., 0.])], 2)
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self._depth = 0

    @classmethod
    def of(cls, loader: Iterable[Any] | Batches, device: torch.device) -> Batches:
        """The same batches if they are some already."""
        return loader if isinstance(loader, Batches) else cls(loader, device)

    def __enter__(self) -> Batches:
        if self._depth == 0:
            self._kept: list[Any] = []
            self._iterator: Iterator[Any] | None = None
            self._given, self._streamed = 0, False  # by the iterator; whether it has gone beyond what is kept
            self._trace: _Trace | None = None
        self._depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._kept, self._iterator = [], None  # its workers end here
            if self._trace is not None:
                self._trace.undo()

    def take(self, count: int) -> list[Any]:
        """The first `count` batches, fewer where there are fewer."""
        with self:
            self._rewind()
            while len(self._kept) < count and (batch := self._read(len(self._kept))) is not _END:
                self._kept.append(batch)
            return [to_device(batch, self.device) for batch in self._kept[:count]]

    def __iter__(self) -> Iterator[Any]:
        """All batches, each read when it is asked for."""
        with self:
            self._rewind()
            self._streamed, number = True, 0
            while (batch := self._kept[number] if number < len(self._kept) else self._read(number)) is not _END:
                yield to_device(batch, self.device)
                number += 1

    def _rewind(self) -> None:
        """Begin again if a stream has gone on from here: on every rank alike, since loaders of several may talk."""
        if self._streamed:
            self._iterator, self._streamed = None, False

    def _read(self, number: int) -> Any:
        """Batch `number` of those with samples in them, or the end: with the random numbers of reading."""
        with rng.aside(self.device):
            if self._iterator is None:
                self._iterator, self._given = self._opened(), 0
            else:
                rng.put_back(self._random, self.device)
            batch = None
            while self._given <= number and batch is not _END:
                batch = next(self._iterator, _END)
                self._given += batch is _END or not is_empty(batch)
            self._random = rng.everywhere(self.device)
        return batch

    def _opened(self) -> Iterator[Any]:
        if length(self.loader) == 0:
            raise TostError("batches: expected at least one batch, got an empty loader; check batch_size and drop_last")
        if not hasattr(self.loader, "__iter__") and not hasattr(self.loader, "__getitem__"):
            raise TostError(f"batches: expected a DataLoader or a list of batches, got {type(self.loader).__name__}")
        self._trace = self._trace or _Trace(self.loader)
        self._trace.undo()  # from the same place each time
        self._trace.set_aside()
        iterator = iter(self.loader)
        if iterator is self.loader:
            raise TostError(
                f"batches: expected something that can be read twice, got a one-shot {type(iterator).__name__}; "
                f"pass the DataLoader itself or a list of batches"
            )
        return iterator


@contextmanager
def reading(loader: Any, device: torch.device) -> Iterator[Batches | None]:
    """Within: the loader's batches for all looks, read once; None without a loader."""
    if loader is None:
        yield None
    else:
        with Batches.of(loader, device) as batches:
            yield batches


class _Trace:
    """What reading moves of a loader: attributes of it and of its samplers, and every generator that it or its data hold."""

    def __init__(self, loader: Any) -> None:
        parts = _parts(loader)
        self.loaders = [part for part in parts if isinstance(part, DataLoader)]
        self.generators = [undo for part in parts if (undo := _undo(part)) is not None]
        self.readers = [(vars(part), dict(vars(part))) for part in parts if _reads(part)]
        self.orders = [  # that a sampler may shuffle where it is
            (value, value.copy())
            for _, attributes in self.readers
            for value in attributes.values()
            if isinstance(value, (list, np.ndarray))
        ]
        plain = (bool, int, float, str, type(None))  # a position, say; what a data set opens and keeps may stay
        self.data = [
            (vars(part), {name: value for name, value in vars(part).items() if isinstance(value, plain)})
            for part in parts
            if isinstance(part, Dataset)
        ]

    def undo(self) -> None:
        for live, before in (*self.readers, *self.data):
            live.update(before)
        for live, before in self.readers:
            for name in live.keys() - before.keys():
                del live[name]
        for live, before in self.orders:
            live[:] = before
        for undo in self.generators:
            undo()

    def set_aside(self) -> None:
        """Let workers that stay with a loader, and may be in the middle of an epoch, not be the ones that read."""
        for loader in self.loaders:
            loader._iterator = None


def generators(owner: Any) -> list[Callable[[], Any]]:
    """What puts back each random generator that an object holds as an attribute."""
    return [undo for part in vars(owner).values() if (undo := _undo(part)) is not None]


def _undo(part: Any) -> Callable[[], Any] | None:
    """What puts a random generator of torch, numpy or Python back where it is now; None for anything else."""
    if isinstance(part, torch.Generator):
        return partial(part.set_state, part.get_state())
    if isinstance(part, np.random.Generator):
        return partial(setattr, part.bit_generator, "state", part.bit_generator.state)
    if isinstance(part, np.random.RandomState):
        return partial(part.set_state, part.get_state())
    return partial(part.setstate, part.getstate()) if isinstance(part, random.Random) else None


def _reads(part: Any) -> bool:
    """Whether this is a loader, a sampler, or what Accelerate's loaders count in."""
    return isinstance(part, (DataLoader, Sampler)) or type(part).__name__ == "GradientState"


def _parts(loader: Any) -> list[Any]:
    """The loader and what it is made of, samplers in samplers in loaders, data sets and transforms; never the data."""
    found, near = {id(loader): loader}, [loader]
    for _ in range(_DEEPEST):
        held = {id(part): part for owner in near for part in _held(owner)}
        near = [part for key, part in held.items() if key not in found]
        found |= held
    return list(found.values())


def _held(part: Any) -> list[Any]:
    if isinstance(part, (type, ModuleType, FunctionType, nn.Module, Tensor)):
        return []
    if not isinstance(part, (dict, tuple, list)):
        part = {**getattr(part, "__dict__", {}), "": getattr(part, "__self__", None)}  # that of a bound method
    if len(part) > _LONGEST:
        return []
    return list(part.values() if isinstance(part, dict) else part)
