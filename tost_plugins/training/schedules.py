"""Curves over a run: each maker returns a function of progress in [0, 1], start at 0.0 and end at 1.0."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(start: float, end: float) -> Schedule:
    """`start` all the way; `end` is what follows after the last moment. `constant(1, 0)(0.99)` is 1, at 1.0 it is 0."""
    return lambda progress: end if progress >= 1 else start


def linear(start: float, end: float) -> Schedule:
    """A straight line: `linear(1, 0)` is 1 at 0.0, 0.5 at 0.5, 0 at 1.0."""
    return lambda progress: _mixed(start, end, 1 - progress)


def cosine(start: float, end: float) -> Schedule:
    """Half a cosine: flat at both ends, `cosine(1, 0)` is 1 at 0.0, 0.5 at 0.5, 0 at 1.0."""
    return lambda progress: _mixed(start, end, (1 + math.cos(math.pi * progress)) / 2)


def cubic(start: float, end: float) -> Schedule:
    """Fast first, then slow: `cubic(1, 0)` is 1 at 0.0, 0.125 at 0.5, 0 at 1.0."""
    return lambda progress: _mixed(start, end, (1 - progress) ** 3)


def geometric(start: float, end: float) -> Schedule:
    """Equal ratios in equal times, for ends of one sign: `geometric(1, 100)` is 1, 10 at 0.5, 100 at 1.0."""
    return lambda progress: end if progress >= 1 else start * (end / start) ** progress


def _mixed(start: float, end: float, share: float) -> float:
    """`share` of `start`, the rest of `end`; at 1 and 0 exactly these, without a rounding error."""
    return start * share + end * (1 - share)


SCHEDULES: dict[str, Callable[[float, float], Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cubic": cubic,
    "geometric": geometric,
}
