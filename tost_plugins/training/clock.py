"""When things happen: times with a unit, and a clock that counts optimizer steps."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from tost_plugins.errors import TostError, shown

_PATTERN = r"^([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)(dur|ep|ba)$"

#: The fields of a clock that say how long its run is.
LENGTHS = ("total_steps", "steps_per_epoch")

_LONGEST = 1e12  # so that numbers of steps fit into 64 bits


def count(name: str, value: Any) -> int | None:
    """A number of optimizer steps that somebody gives, 0 or more, or None; raises TostError for anything else.

    Example:
        >>> count("total_steps", 100)
        100
    """
    try:
        number = None if value is None else operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or (number is not None and number < 0):
        raise TostError(
            f"{name}: expected a whole number of optimizer steps, got {shown(value)}; write {name}=100, say"
        )
    return number


@dataclass(frozen=True)
class Clock:
    """How far a run is, in optimizer steps (never micro-batches).

    `step` counts finished optimizer steps; `total_steps` and `steps_per_epoch` are those of the whole run, or None
    where the caller does not know them. A time in a unit that the clock cannot convert is an error when it is used.

    Example:
        >>> Clock(step=30, total_steps=100).progress(Time.parse("0.6dur"))
        0.5
    """

    step: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None

    def at(self, step: int) -> Clock:
        """The same clock at another step."""
        return replace(self, step=step)

    def progress(self, until: Time) -> float:
        """The share of `[0, until]` that has passed: 0.0 before the first step, 1.0 from `until` on."""
        end = until.steps(self)
        return 1.0 if self.step >= end else self.step / end


@dataclass(frozen=True)
class Time:
    """A moment of a run: `0.4dur` (share of the run), `60ep` (epochs) or `500ba` (optimizer steps).

    Example:
        >>> Time.parse("0.4dur").steps(Clock(total_steps=1000))
        400
        >>> Time.parse("2ep").steps(Clock(steps_per_epoch=50))
        100
    """

    value: float
    unit: Literal["dur", "ep", "ba"]

    @classmethod
    def parse(cls, text: Time | str) -> Time:
        """Read a time; raises TostError on a bare number, an unknown unit, or a share above 1."""
        if isinstance(text, Time):
            return text
        remedy = "write a number with a unit: '0.4dur' (share of the run), '60ep' (epochs) or '500ba' (steps)"
        match = re.match(_PATTERN, text.strip()) if isinstance(text, str) else None
        if match is None:
            raise TostError(f"time: expected a number with a unit, got {text!r}; {remedy}")
        time = cls(float(match[1]), match[2])  # type: ignore[arg-type]
        if time.unit == "dur" and time.value > 1:
            raise TostError(f"time: expected at most 1dur, the whole run, got {text!r}; {remedy}")
        if time.value > _LONGEST:
            raise TostError(f"time: expected at most {_LONGEST:g} epochs or steps, got {text!r}; {remedy}")
        return time

    def steps(self, clock: Clock) -> int:
        """This time in optimizer steps of that clock's run, rounded to the nearest, but at least one unless it is 0, so that
        a tweak also comes by in a run of a few steps; raises TostError if unknown."""
        at_least = 1 if self.value else 0
        if self.unit == "ba":
            return max(at_least, round(self.value))
        scale = clock.total_steps if self.unit == "dur" else clock.steps_per_epoch
        if scale is None:
            name = "total_steps" if self.unit == "dur" else "steps_per_epoch"
            raise TostError(
                f"time {str(self)!r}: expected a run of known length, got {name}=None; "
                f"pass {name}=... or write the time in optimizer steps, like '500ba'"
            )
        return max(at_least, round(self.value * scale))

    def __str__(self) -> str:
        whole = self.value == int(self.value)
        return f"{int(self.value) if whole else self.value}{self.unit}"  # all digits: it is read again


def times_of(settings: Any) -> dict[str, Time]:
    """Name -> value of those fields of a mask method or a tweak that are times."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: value for name, value in values.items() if isinstance(value, Time)}


def _parsed(value: object) -> Time:
    try:
        return Time.parse(value)  # type: ignore[arg-type]
    except TostError as error:
        raise ValueError(str(error)) from None


#: A field of a recipe that holds a Time and is written as its text.
TimeField = Annotated[
    Time,
    BeforeValidator(_parsed),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _PATTERN, "examples": ["0.4dur", "60ep", "500ba"]}),
]
