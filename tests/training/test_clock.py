"""Times with a unit, and the clock that counts optimizer steps."""

import dataclasses

import pytest
from pydantic import TypeAdapter, ValidationError

from tost_plugins import TostError
from tost_plugins.training.clock import Clock, Time, TimeField

REMEDY = "write a number with a unit: '0.4dur' (share of the run), '60ep' (epochs) or '500ba' (steps)"
RUN = Clock(step=0, total_steps=1000, steps_per_epoch=50)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0dur", 0), ("0.4dur", 400), ("1dur", 1000), ("1.0dur", 1000), (".25dur", 250), ("0.0004dur", 1), ("0.0016dur", 2),
        ("0ep", 0), ("0.001ep", 1), ("1ep", 50), ("2.5ep", 125), ("60ep", 3000),
        ("0ba", 0), ("1ba", 1), ("500ba", 500), ("2e3ba", 2000), (" 7ba ", 7),
    ],
)  # fmt: skip
def test_a_time_in_optimizer_steps(text: str, steps: int) -> None:
    assert Time.parse(text).steps(RUN) == steps
    assert Time.parse(Time.parse(text)) == Time.parse(text)


@pytest.mark.parametrize(
    "text",
    ["0dur", "0.4dur", "1dur", "60ep", "500ba", "1234567ba", "0.123456789dur", "1e-07dur", "2.5ep", "12345678901ba"],
)
def test_a_time_is_written_as_it_is_read(text: str) -> None:
    assert str(Time.parse(text)) == text and Time.parse(str(Time.parse(text))) == Time.parse(text)


@pytest.mark.parametrize("wrong", [100, 0.4, 0, None, True, "100", "0.4", "", "dur", "-1ep", "ep5", "5 dollars", "5s", "5dur5ba",
                                   "5epochs", "0,4dur", "nandur", "infba", "1_000ba", "4 ep", "٣ep", ["1ep"]])  # fmt: skip
def test_a_number_without_a_known_unit_is_an_error(wrong: object) -> None:
    with pytest.raises(TostError) as error:
        Time.parse(wrong)  # type: ignore[arg-type]
    assert str(error.value) == f"time: expected a number with a unit, got {wrong!r}; {REMEDY}"


@pytest.mark.parametrize("wrong", ["1.01dur", "40dur", "1e400ba", "1e999ep", "2e12ba"])
def test_a_share_above_one_and_a_number_without_end_are_errors(wrong: str) -> None:
    with pytest.raises(TostError) as error:
        Time.parse(wrong)
    most = "1dur, the whole run" if wrong.endswith("dur") else "1e+12 epochs or steps"
    assert str(error.value) == f"time: expected at most {most}, got {wrong!r}; {REMEDY}"


@pytest.mark.parametrize(("text", "name"), [("0.4dur", "total_steps"), ("3ep", "steps_per_epoch")])
def test_a_unit_that_the_clock_cannot_convert_is_an_error_when_used(text: str, name: str) -> None:
    known = {"total_steps": 10, "steps_per_epoch": 10} | {name: None}
    clock, time = Clock(**known), Time.parse(text)
    message = (
        f"time '{text}': expected a run of known length, got {name}=None; "
        f"pass {name}=... or write the time in optimizer steps, like '500ba'"
    )
    for use in (lambda: time.steps(clock), lambda: clock.progress(time)):
        with pytest.raises(TostError) as error:
            use()
        assert str(error.value) == message
    assert Clock().progress(Time.parse("5ba")) == 0.0


@pytest.mark.parametrize(
    ("step", "until", "progress"),
    [
        (0, "0.4dur", 0.0), (1, "0.4dur", 0.0025), (200, "0.4dur", 0.5), (399, "0.4dur", 0.9975), (400, "0.4dur", 1.0),
        (401, "0.4dur", 1.0), (9999, "1dur", 1.0), (0, "0ba", 1.0), (0, "0dur", 1.0), (1, "2ba", 0.5), (2, "2ba", 1.0),
    ],
)  # fmt: skip
def test_progress(step: int, until: str, progress: float) -> None:
    found = RUN.at(step).progress(Time.parse(until))
    assert found == progress and isinstance(found, float)


def test_a_clock_at_another_step_is_another_clock() -> None:
    later = RUN.at(7)
    assert later == Clock(7, 1000, 50) and RUN.step == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUN.step = 1  # type: ignore[misc]


def test_a_field_of_a_recipe() -> None:
    field = TypeAdapter(TimeField)
    assert field.validate_python("3ep") == Time(3, "ep")
    assert field.dump_json(Time(0.25, "dur")) == b'"0.25dur"' and field.dump_python(Time(3, "ep")) == "3ep"
    with pytest.raises(ValidationError, match="expected a number with a unit, got 3; write"):
        field.validate_python(3)
    schema = field.json_schema()
    assert schema["type"] == "string" and schema["examples"] == ["0.4dur", "60ep", "500ba"]
