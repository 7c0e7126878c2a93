"""Tweaks that act around the optimizer's step, in every trainer: called once a step, with what the plain loop calls them with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_cases import STEPS, Digits
from step_cases import TRAINERS, Around, train
from step_watch import SEEN, calls, noting, same
from test_same_everywhere import recipe, stop_at, weights
from torch import Tensor

from tost_plugins import Session, TostError
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import train as train_recipe
from tost_plugins.training.params import prunable

RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}
RIGL = {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6}
DNW = {"kind": "dnw", "sparsity": 0.6}
BOTH = ["neuron_gradients", {"kind": "multiplicative", "warmup": "2ba"}]
CLIP, OVERFLOWS = 0.5, (2, 5)


def noted(trainer: str, mask: dict[str, Any] = RANDOM, **around: Any) -> list[dict[str, Any]]:
    """What a run of ten steps has called a tweak with."""
    net = Digits(norm=False).double()
    train(trainer, Around({"mask": mask, "tweaks": [noting()]}, dtype=torch.float64, **around), net)
    return copy.copy(SEEN)


def plain_names(session: Session) -> dict[str, Tensor]:
    """The weights under the network's own names: adapters wrap it."""
    weights = {name: value.clone() for name, value in session.model.state_dict().items()}
    return {name.removeprefix("module.").removeprefix("module."): value for name, value in weights.items()}


# ---- the moments


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_once_before_and_once_behind_every_step(trainer: str, parts: int) -> None:
    plain = noted("torch", clip=CLIP)
    found = noted(trainer, clip=CLIP, parts=parts)
    assert calls() == [(moment, step) for step in range(STEPS) for moment in ("before", "after")]
    for one, other in zip(plain, found, strict=True):
        assert other["rates"] == {0.05}
        for key in ("gradients", "weights"):
            named = {name.removeprefix("module.").removeprefix("module."): value for name, value in other[key].items()}
            assert named.keys() == one[key].keys()
            for name, value in one[key].items():
                torch.testing.assert_close(named[name], value)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert same(before["gradients"], after["gradients"]) and not same(before["weights"], after["weights"])
        assert torch.stack([grad.norm() for grad in before["gradients"].values()]).norm() <= CLIP * 1.001


@pytest.mark.parametrize("trainer", TRAINERS)
def test_not_where_the_mask_moves_in_place_of_the_step(trainer: str) -> None:
    noted(trainer, RIGL)
    taken = [step for step in range(STEPS) if step not in (2, 4, 6)]
    assert calls() == [(moment, step) for step in taken for moment in ("before", "after")]


@pytest.mark.parametrize("clip", [0.0, CLIP], ids=["whole", "clipped"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_not_where_a_loss_scaler_skips_the_step_and_unscaled_behind_it(trainer: str, clip: float) -> None:
    counts = trainer in ("composer", "transformers", "lightning")
    plain = noted("torch", clip=clip, left_out=OVERFLOWS)
    found = noted(trainer, clip=clip, scaled=True, overflows=OVERFLOWS)
    taken = [step for step in range(STEPS) if step not in OVERFLOWS] if counts else range(STEPS - len(OVERFLOWS))
    assert calls() == [(moment, step) for step in taken for moment in ("before", "after")]
    for one, other in zip(plain[1::2], found[1::2], strict=True):  # behind each step, its gradients as without a scaler
        for wanted, value in zip(one["gradients"].values(), other["gradients"].values(), strict=True):
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradients_are_those_from_before_an_optimizer_has_written_into_them(trainer: str) -> None:
    """As Nesterov's momentum does for several tensors at once, the way that it takes on GPUs."""

    def nesterov(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True)

    found = noted(trainer, scaled=True, optimizer=nesterov)
    assert len(found) == 2 * STEPS
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert same(before["gradients"], after["gradients"])


def test_a_fused_optimizer_gets_the_scale_and_skips_by_itself() -> None:
    def fused(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01, fused=True)

    plain = noted("torch", left_out=OVERFLOWS, optimizer=fused)
    found = noted("torch", scaled=True, overflows=OVERFLOWS, optimizer=fused)
    steps = STEPS - len(OVERFLOWS)
    assert calls() == [(moment, step) for step in range(steps) for moment in ("before", "after")]
    for one, other in zip(plain[1::2], found[1::2], strict=True):
        for name, value in one["gradients"].items():
            torch.testing.assert_close(other["gradients"][name], value)


# ---- both tweaks


@pytest.mark.parametrize("mask", [RANDOM, RIGL, DNW], ids=lambda mask: mask["kind"])
@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_runs_are_the_plain_loops(trainer: str, mask: dict[str, Any]) -> None:
    found = [train(which, Around({"mask": mask, "tweaks": BOTH}, clip=CLIP)) for which in ("torch", trainer)]
    assert found[0].mask == found[1].mask and same(plain_names(found[0]), plain_names(found[1]))
    without = train("torch", Around({"mask": mask}, clip=CLIP))
    assert not same(plain_names(found[0]), plain_names(without))
    assert not any(
        hasattr(session.model, f"tost_{kind}") for session in found for kind in ("neuron_gradients", "multiplicative")
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_scaled_run_is_the_plain_one_without_the_skipped_steps(trainer: str) -> None:
    recipe = {"mask": RANDOM, "tweaks": ["neuron_gradients", {"kind": "multiplicative", "warmup": "0ba"}]}
    made: dict[str, Any] = {"dtype": torch.float64, "clip": CLIP}
    plain = train("torch", Around(recipe, left_out=OVERFLOWS, **made), Digits(norm=False).double())
    found = train(trainer, Around(recipe, scaled=True, overflows=OVERFLOWS, **made), Digits(norm=False).double())
    for name, value in plain_names(plain).items():
        torch.testing.assert_close(plain_names(found)[name].view_as(value), value)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bfloat16_and_a_compiled_network(trainer: str) -> None:
    recipe = {"mask": RANDOM, "tweaks": BOTH}
    plain = train("torch", Around(recipe, bf16=True, clip=CLIP))
    found = train(trainer, Around(recipe, bf16=True, clip=CLIP))
    assert same(plain_names(plain), plain_names(found))
    torch._dynamo.reset()
    eager, compiled = (train(trainer, Around(recipe, clip=CLIP, backend=backend)) for backend in ("", "eager"))
    torch._dynamo.reset()
    for name, value in plain_names(eager).items():
        torch.testing.assert_close(plain_names(compiled)[name], value, rtol=1e-4, atol=1e-5)
    assert not any(bool(param.detach()[~compiled.mask[name]].any()) for name, param in prunable(compiled.model).items())


def test_in_composer_clipping_stands_behind_them_in_the_list() -> None:
    pytest.importorskip("composer")
    from composer.algorithms import EMA, SAM, GradientClipping

    def run(tweaks: list[Any], algorithms: Any) -> Session:
        return train("composer", Around({"mask": RANDOM, "tweaks": tweaks}, algorithms=algorithms))

    clip = GradientClipping("norm", CLIP)
    with pytest.raises(
        TostError, match=r"TostAlgorithm: expected to be in front of GradientClipping .*; write \[TostAlg"
    ):
        run(BOTH, lambda tost: [clip, tost])
    run([], lambda tost: [clip, tost])
    plain = train("torch", Around({"mask": RANDOM, "tweaks": BOTH}, clip=CLIP))
    assert same(plain_names(run(BOTH, lambda tost: [tost, clip])), plain_names(plain))
    for other in (SAM(), EMA(half_life="2ba")):
        session = run(BOTH, lambda tost, other=other: [tost, other])
        assert session.state == "finished" and session.clock.step == STEPS


@pytest.mark.parametrize(
    "trainer", [*TRAINERS[:2], *(pytest.param(name, marks=pytest.mark.long) for name in TRAINERS[2:])]
)
def test_a_run_that_stops_and_goes_on_is_the_whole_one(tmp_path: Path, trainer: str) -> None:
    spec = recipe(trainer, tweaks=BOTH, compact=True, mask={"kind": "random", "sparsity": 0.9}, duration="8ba")
    result = train_recipe(spec, tmp_path / "whole")
    assert result["tweaks"] == ["neuron_gradients", "multiplicative"] and result["left_out"] == []
    assert 0 < result["history"][-1]["tost/multiplicative/exponent"] <= 0.05
    with pytest.raises(Stopped):
        train_recipe(spec, tmp_path / "stopped", listen=stop_at(5))
    assert train_recipe(spec, tmp_path / "stopped", resume=True) == result
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
