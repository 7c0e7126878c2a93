"""What the benchmarks share: contenders measured in turn, rows of raw numbers, and what of them is compared."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

#: What a contender does in one round; it may return the seconds that count, where not all of them do.
Contender = Callable[[], float | None]


class Row(NamedTuple):
    """One raw number. `case` is the setting; contenders with the same case and round were measured side by side."""

    case: str
    contender: str
    round: int
    value: float
    unit: str  # "s", "B", or "" for a plain number


@dataclass(frozen=True)
class Ratio:
    """A line of a table: contender `of` divided by contender `to` of the same round; without `to` the number itself.

    `share` is how often `of` happens beside `rest`: 0.01 for one step in 100. The limit is `most` or `least`.
    """

    name: str
    of: str
    to: str = ""
    most: float | None = None
    least: float | None = None
    share: float = 1.0
    rest: str = ""
    unit: str = "s"

    def values(self, rows: list[Row]) -> list[float]:
        """One per round, from the rows of one case."""
        table = {name: {r.round: r.value for r in rows if r.contender == name and r.unit == self.unit}
                 for name in (self.of, self.rest, self.to)}  # fmt: skip

        def over(name: str) -> list[float]:
            return [value / table[self.to][i] if self.to else value for i, value in sorted(table[name].items())]

        if not self.rest:
            return over(self.of)
        return [self.share * a + (1 - self.share) * b for a, b in zip(over(self.of), over(self.rest), strict=False)]

    def holds(self, median: float) -> bool | None:
        """Whether the limit is held; None without one."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or median <= self.most) and (self.least is None or median >= self.least)


def rounds(contenders: Mapping[str, Contender], count: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each of `count` rounds, after some that warm up; a new order in every round."""
    order, times = random.Random(0), {name: [] for name in contenders}
    for turn in range(count + warm_up):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            own = contenders[name]()
            taken = time.perf_counter() - start if own is None else own
            if turn >= warm_up:
                times[name].append(taken)
    return times


def timed(
    case: str, contenders: Mapping[str, Contender], count: int, first: int = 0, warm_up: int = 2
) -> Iterator[Row]:
    """The rows of `rounds`, numbered from `first` on."""
    for name, taken in rounds(contenders, count, warm_up).items():
        yield from (Row(case, name, first + i, seconds, "s") for i, seconds in enumerate(taken))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value that value."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3  # type: ignore[return-value]


def alone(script: str, *arguments: str, launcher: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process, and read the JSON object that is its last line."""
    command = [sys.executable, *launcher, str(Path(__file__).with_name(script)), *arguments]
    # freed tensors go back to the system at once, so that the peak is that of what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Bytes of memory that this process uses now; from now on `peak` means the most since. Needs Linux."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that this process has used since `resident`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
