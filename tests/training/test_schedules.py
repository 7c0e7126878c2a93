"""The curves: their ends, their middles, and that they go one way only."""

import itertools

import pytest

from tost_plugins.training.schedules import SCHEDULES, constant, cosine, cubic, geometric, linear

ENDS = [(1.0, 0.0), (0.0, 1.0), (1, 10), (0.1, 0.7), (0.3, 0.1), (3.0, 7.0), (-2.0, -0.3), (5.0, 5.0), (1e-3, 1e3)]


CASES = [(name, *ends) for name in SCHEDULES for ends in ENDS if name != "geometric" or ends[0] * ends[1] > 0]


@pytest.mark.parametrize(("name", "start", "end"), CASES)
def test_a_schedule_starts_and_ends_exactly_and_goes_one_way(name: str, start: float, end: float) -> None:
    curve = SCHEDULES[name](start, end)
    assert curve(0.0) == start and curve(1.0) == end
    values = [curve(i / 64) for i in range(65)]
    slope = 1 if end >= start else -1
    assert all(slope * (b - a) >= -1e-12 * abs(a) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        (constant(1, 0), [1, 1, 1, 1, 0]),
        (linear(1, 0), [1, 0.75, 0.5, 0.25, 0]),
        (linear(2, 10), [2, 4, 6, 8, 10]),
        (cosine(1, 0), [1, 0.8535533905932737, 0.5, 0.14644660940672627, 0]),
        (cosine(0, 4), [0, 0.5857864376269051, 2, 3.414213562373095, 4]),
        (cubic(1, 0), [1, 0.421875, 0.125, 0.015625, 0]),
        (cubic(0, 0.9), [0, 0.5203125, 0.7875, 0.8859375, 0.9]),
        (geometric(1, 16), [1, 2, 4, 8, 16]),
        (geometric(100, 1), [100, 31.622776601683793, 10, 3.1622776601683795, 1]),
        (geometric(-1, -16), [-1, -2, -4, -8, -16]),
    ],
)
def test_values_by_hand(curve, values: list[float]) -> None:
    assert [curve(i / 4) for i in range(5)] == pytest.approx(values, abs=1e-12)


def test_the_names_are_those_of_the_functions() -> None:
    assert {name: maker.__name__ for name, maker in SCHEDULES.items()} == {name: name for name in SCHEDULES}
