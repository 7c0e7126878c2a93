"""Contenders timed in turn, so that what the machine does beside them falls on all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

_WARM_UP = 2  # rounds


def rounds(contenders: Mapping[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of each contender in each of `count` rounds, after two that warm up; a new order in every round."""
    order, times = random.Random(0), {name: [] for name in contenders}
    for turn in range(count + _WARM_UP):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if turn >= _WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times
