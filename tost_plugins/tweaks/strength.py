"""How strong a tweak is in a model now: what the schedule has set, and what its copies and its forward pass go by."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tost_plugins.training.log import say


class Strength:
    """`value` while `live`, else the plain network, as also while `quiet`; all places of a model have one between them.

    The places' own buffers carry the value into checkpoints. A copy of the model shares its strength, whatever an average
    writes into its buffers: it is as strong as its run is now, and plain when that is over. Who trains the copy gives it
    one of its own (`of`), and so does a pickle.
    """

    def __init__(self, value: float, live: bool = False) -> None:
        self.value, self.live, self.quiet, self.said = value, live, False, False
        self.step: int | None = None  # for which the schedule was asked last
        self.held: int | None = (
            None  # the step at which weights of a plain network came in: they stay so until the next
        )
        self.places: WeakSet[nn.Module] = WeakSet()  # those in the model that trains, not in its copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Strength:
        return self

    def __reduce__(self) -> tuple:
        return Strength, (self.value, self.live)

    @staticmethod
    def of(places: Iterator[Any]) -> Strength | None:
        """That of a model with these places, which is given one of its own where it is a copy; None without places."""
        first = next(places, None)
        if first is None or first in first.tost_strength.places:
            return first and first.tost_strength
        strength = Strength(first.tost_strength.value, first.tost_strength.live)
        for place in (first, *places):
            strength.places.add(place)
            place.tost_strength = strength
        return strength

    def now(self, buffer: Tensor) -> Tensor | float:
        """The value as the place's buffer holds it. A compiled forward reads the buffer itself, since there a number would be
        a constant; elsewhere it is a number: GPUs take several times as long for a product with a tensor of another dtype."""
        return buffer if torch.compiler.is_compiling() else _rounded(self.value, buffer.dtype)

    @property
    def heard(self) -> bool:
        """Whether the forward pass is another than the plain network's."""
        return self.live and not self.quiet

    def follow(self, step: int, value: float, live: bool) -> bool:
        """Be what the schedule says for a step; False where the buffers need not be written."""
        self.step = step
        if step == self.held or not (live or self.live):
            return False
        self.value, self.live, self.held = value, live, None
        return True

    def loaded(self, place: nn.Module, value: float, live: bool) -> None:
        """Be what a state dict holds that was loaded into a place; a copy goes on with its run."""
        if place in self.places or not self.places:
            self.value, self.live = value, live
            self.held = None if live else self.step

    def say_once(self, message: str) -> None:
        """Say it in the first forward pass that finds it."""
        if not self.said:
            say(message)
        self.said = True

    def end(self, place: nn.Module) -> None:
        """The run of this place's model is over, so that its copies are plain from now on."""
        if place in self.places:
            self.live = False


@functools.lru_cache(maxsize=8)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


@contextlib.contextmanager
def quiet(strength: Strength | None) -> Iterator[None]:
    """Within: the plain network."""
    strength = strength or Strength(0.0)
    before, strength.quiet = strength.quiet, True
    try:
        yield
    finally:
        strength.quiet = before
