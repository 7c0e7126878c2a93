"""Masks that move, five trainers: the same history of masks and the same network, also after a stop at any step."""

import contextlib
import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_cases import MOVES, MOVING, STEPS, Digits
from torch import Tensor

from tost_plugins import Mask
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import prepare
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.buffers import beside
from tost_plugins.training.params import prunable

TRAINERS = ("torch", "accelerate", "transformers", "composer", "lightning")
CASES = {**MOVING, "dnw_frozen": {**MOVING["dnw_frozen"], "freeze": "1ep"}}
TWEAKS = [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "7ba"}, "label_smoothing"]
#: Metrics of the last step, the history of masks, the weights.
Run = tuple[list[dict[str, Any]], list[Mask], dict[str, Tensor]]


def recipe(trainer: str, case: str, **changes: Any) -> Recipe:
    """Ten steps in epochs of four; skips the test where the trainer is not installed."""
    if trainer != "torch":
        pytest.importorskip(trainer)
    return Recipe.from_dict(
        {
            "mask": CASES[case],
            "data": {"name": "digits", "limit": 128, "batch_size": 32},
            "optimizer": {"lr": 0.05},
            "duration": f"{STEPS}ba",
            "trainer": trainer,
            **changes,
        }
    )


def run(spec: Recipe, out: Path, stop: int = 0, resume: bool = False) -> Run:
    """A run, or its part up to a stop, or what is left of it; the masks are looked at after every step."""
    job = prepare(spec, out)
    out.mkdir(exist_ok=True)
    job.model, masks = Digits(), []

    def listen(event: str, values: dict[str, Any]) -> None:
        if event == "step":
            masks.append(Mask(beside(job.model, prunable(job.model))))
            job.stop = values["step"] == stop

    job.listen = listen
    train = importlib.import_module(f"tost_plugins.lab.loops.{spec.trainer}").run
    with pytest.raises(Stopped) if stop else contextlib.nullcontext():
        session = train(job, resume)
        assert session.mask == Mask.from_zeros(prunable(job.model)) and session.clock.step == STEPS
        assert list(job.model.state_dict()) == list(Digits().state_dict())
    return job.history, masks, {name: value.clone() for name, value in job.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a trainer and a case."""

    @functools.cache
    def get(trainer: str, case: str) -> Run:
        return run(recipe(trainer, case), tmp_path_factory.mktemp(trainer))

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_history_of_masks_is_the_same(whole: Any, trainer: str, case: str) -> None:
    history, masks, weights = whole(trainer, case)
    expected, plain, network = whole("torch", case)
    assert masks == plain and len(masks) == STEPS
    assert same(weights, network) and history == expected
    moved = [i for i in range(2, STEPS + 1) if masks[i - 1] != masks[i - 2]]
    if case == "top_kast":
        assert set(moved) <= set(MOVES[case]) and len(moved) > 2
    elif case == "edge_popup":
        assert 2 in moved and set(moved) <= set(MOVES[case])
    elif not case.startswith("dnw"):
        assert moved == [i for i in MOVES[case] if i > 1]
    else:
        assert 2 in moved and (max(moved) <= 4) == (case == "dnw_frozen")


@pytest.mark.parametrize("stop", range(1, STEPS))
@pytest.mark.parametrize("case", ["rigl", "dnw"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_stops_at_any_step_goes_on_bit_for_bit(
    whole: Any, tmp_path: Path, trainer: str, case: str, stop: int
) -> None:
    history, masks, weights = whole(trainer, case)
    before = run(recipe(trainer, case), tmp_path, stop)[1]
    again = run(recipe(trainer, case), tmp_path, resume=True)
    assert before + again[1] == masks and len(before) == stop
    assert same(again[2], weights) and again[0] == history


@pytest.mark.parametrize("case", ["dnw_frozen", "top_kast", "set", "snfs", "gradual", "ac_dc", "edge_popup"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_others_too_where_it_matters(whole: Any, tmp_path: Path, trainer: str, case: str) -> None:
    for stop in (3, 4):
        out = tmp_path / str(stop)
        before = run(recipe(trainer, case), out, stop)[1]
        again = run(recipe(trainer, case), out, resume=True)
        assert before + again[1] == whole(trainer, case)[1] and same(again[2], whole(trainer, case)[2])


@pytest.mark.parametrize("case", ["rigl", "dnw"])
def test_tweaks_and_another_optimizer_on_top(tmp_path: Path, case: str) -> None:
    changes = {"tweaks": TWEAKS, "optimizer": {"kind": "adamw", "lr": 0.01}}
    ends = {}
    for trainer in TRAINERS:
        if trainer == "torch" or importlib.util.find_spec(trainer):
            run(recipe(trainer, case, **changes), tmp_path / trainer, stop=5)
            ends[trainer] = run(recipe(trainer, case, **changes), tmp_path / trainer, resume=True)
    expected = run(recipe("torch", case, **changes), tmp_path / "whole")
    for history, masks, weights in ends.values():
        assert masks == expected[1][5:] and same(weights, expected[2]) and history == expected[0]
