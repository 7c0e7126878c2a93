"""Optimizers that take their weights from numbers of their own, so that what others write into the network is lost or means
something else: schedule-free ones, dual averages. It is tried out when a run starts whose tweaks write there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.trial import group_of, quiet, take_step, twin, wave

_STEPS, _CHANGE, _SLOW = 12, 0.1, 1e-3
_LEAST = 0.4  # of a change: half is left by what averages a step's weights with earlier ones, of its own steps too


def why_not(optimizers: Optimizers, weights: Mapping[str, nn.Parameter]) -> str | None:
    """Which of the optimizers does not let others change these weights after a step, and why; None if all do."""
    for optimizer in optimizers.inner:
        name, held = type(optimizer).__name__, {id(p) for group in optimizer.param_groups for p in group["params"]}
        weight = next((param for param in weights.values() if id(param) in held), None)
        if weight is None:
            continue
        if isinstance(optimizer, torch.optim.LBFGS):
            return f"{name}, whose step follows from the way between its gradients"
        if group_of(optimizer, weight).get("lr") is None:
            return f"{name}, whose group has no learning rate `lr`"
        with contextlib.suppress(Exception):  # somebody's class, made in another way: nobody knows
            if (left := lasts(optimizer, weight)) < _LEAST:
                return (
                    f"{name}, which keeps weights of its own: of a change {_STEPS - 1} steps leave {max(left, 0.0):.0%}"
                )
    return None


def lasts(optimizer: Any, weight: nn.Parameter) -> float:
    """Which share of what is added to a weight after a step is still there eleven steps later: 1 where it is another weight
    from there on, 0 where it is forgotten. Raises whatever the optimizer raises.

    Example:
        >>> weight = nn.Parameter(torch.ones(4, 4))
        >>> round(lasts(torch.optim.Adam([weight]), weight), 2)
        1.0
    """
    shape, ends = [4, 3, *[1] * (weight.ndim - 2)], []
    slow = {"lr": _SLOW} if "lr" in group_of(optimizer, weight) else {}
    numbers, ones = wave([(_STEPS + 1) * 12]).chunk(_STEPS + 1), torch.ones(shape)
    with quiet():
        for change in (0.0, _CHANGE):
            probe = nn.Parameter(numbers[0].view(shape).clone())
            made = twin(optimizer, weight, probe, **slow)
            for turn, slope in enumerate(numbers[1:]):
                take_step(made, probe, slope.view(shape), ones)
                if turn == 0:
                    probe.add_(change)
            ends.append(probe.detach().clone())
    return float((ends[1] - ends[0]).mean() / _CHANGE)
