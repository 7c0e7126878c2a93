"""A tweak that notes when it is called around a step, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tost_plugins.tweaks.base import Step
from tost_plugins.tweaks.neuron_gradients import NeuronGradients

SEEN: list[dict[str, Any]] = []


class Noting(NeuronGradients):
    """Changes nothing; a recipe takes it for the kind that it derives from."""

    def before_step(self, model: nn.Module, step: Step) -> None:
        _note("before", step)

    def after_step(self, model: nn.Module, step: Step) -> None:
        _note("after", step)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        return {}


def _note(moment: str, step: Step) -> None:
    SEEN.append(
        {
            "moment": moment,
            "step": step.clock.step,
            "gradients": {name: grad.detach().clone() for name, grad in step.gradients.items()},
            "weights": {name: weight.detach().clone() for name, weight in step.weights.items()},
            "rates": {step.rate(weight) for weight in step.weights.values()},
        }
    )


def noting() -> Noting:
    """The tweak, with nothing noted yet."""
    SEEN.clear()
    return Noting()


def calls() -> list[tuple[str, int]]:
    return [(seen["moment"], seen["step"]) for seen in SEEN]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
