"""Optimizers whose steps are not those of the kept weights alone: means over whole tensors, factors of rows and columns,
orthogonal or rotated matrices count removed weights as zeros. It is tried out once, when a run starts, and said in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.trial import group_of, quiet, take_step, twin, wave
from tost_plugins.training.log import say

_STEPS = 12
_CLOSE = 0.02  # of the way that the kept weights go: what is less is not said
_OWN = (
    "params",
    "param_names",
    "lr",
    "initial_lr",
    "weight_decay",
    "lr_scale",
)  # groups that differ in these are as one
_FAR = 5  # times as far as a new weight: what is less is not said
_SIZE, _FEWEST = 400, 16  # weights of the layer that is tried, and how many of them are kept at least


def compare(optimizer: Any, weight: nn.Parameter, density: float) -> tuple[float, float] | None:
    """How a layer's kept weights move beside the same ones in a layer of their own: how many times as far, and which share
    of their way goes elsewhere. None if the optimizer moves nothing; raises whatever the optimizer raises.

    Example:
        >>> weight = nn.Parameter(torch.ones(4, 4))
        >>> compare(torch.optim.Adam([weight]), weight, 0.1)
        (1.0, 0.0)
    """
    size = min(max(_SIZE, round(_FEWEST / max(density, 1e-6))), 100 * _SIZE)
    more = [1] * (weight.ndim - 2)
    whole, alone = ([n, n + 1, *more] for n in (round(math.sqrt(size)), max(2, round(math.sqrt(size * density)))))
    total, count = torch.Size(whole).numel(), min(torch.Size(alone).numel(), torch.Size(whole).numel())
    whole, alone = (whole, alone) if weight.ndim > 1 else ([total], [count])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(total, dtype=torch.bool).index_fill(0, order[:count], True).view(whole)
    masked, own = (_way(optimizer, weight, kept) for kept in (keep, torch.ones(alone, dtype=torch.bool)))
    if not own.isfinite().all() or not own.any():
        return None
    factor = float(masked.norm() / own.norm())
    if not math.isfinite(factor) or factor == 0:
        return factor, 1.0
    return factor, float((masked / factor - own).norm() / own.norm())


def late(optimizer: Any, weight: nn.Parameter, idle: int = 200) -> float:
    """How many times as far as a new weight one goes in its first step that had no gradient for `idle` steps; 1 where the
    optimizer moves neither. Raises whatever the optimizer raises.

    Example:
        >>> weight = nn.Parameter(torch.ones(4, 4))
        >>> round(late(torch.optim.Adagrad([weight]), weight), 2), late(torch.optim.NAdam([weight]), weight) > 5
        (1.0, True)
    """
    keep = torch.tensor([[True, False, True], [False, True, False]] * 2).view(4, 3, *[1] * (weight.ndim - 2))
    keep = keep if weight.ndim > 1 else keep.flatten()
    rate = {"lr": _rate(optimizer, weight)} if "lr" in group_of(optimizer, weight) else {}
    with quiet():
        probe = nn.Parameter(torch.zeros(keep.shape))
        made = twin(optimizer, weight, probe, **rate)
        slopes = [keep * (-1.0) ** turn for turn in range(idle + 1)] + [torch.ones(keep.shape)]
        ways = []
        for slope in slopes:
            probe.zero_()
            probe.grad = slope
            made.step()
            ways.append(probe.detach().abs())
        new, moved = ways[0][keep].mean(), ways[-1][~keep].mean()
    return float(moved / new) if new and moved.isfinite() else 1.0


def say_what_counts(optimizers: Optimizers, kept: Mapping[nn.Parameter, Tensor], grows: bool = False) -> None:
    """One line for each optimizer under which removed weights count, or of which nobody knows; where the mask `grows` weights,
    also for one that throws them far."""
    said: set[str] = set()
    for optimizer in optimizers.inner:
        alike: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        for group in optimizer.param_groups:
            settings = str({key: value for key, value in group.items() if key not in _OWN})
            masks = [(param, kept[param]) for param in group["params"] if param in kept and not kept[param].all()]
            alike.setdefault(settings, []).extend(masks)
        for masks in filter(None, alike.values()):
            weight = max((param for param, _ in masks), key=lambda param: param.numel())
            density = sum(int(mask.count_nonzero()) for _, mask in masks) / sum(mask.numel() for _, mask in masks)
            lines = [_line(optimizer, weight, density), _late_line(optimizer, weight) if grows else ""]
            for line in lines:
                if line and line not in said:
                    said.add(line)
                    say(line)


def _line(optimizer: Any, weight: nn.Parameter, density: float) -> str:
    name = type(optimizer).__name__
    try:
        found = compare(optimizer, weight, density)
    except Exception as error:  # somebody's class, made in another way
        why = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        return f"{name}: whether removed weights count in its steps could not be tried out ({why})"
    if found is None or (abs(found[0] - 1) < _CLOSE and found[1] < _CLOSE):
        return ""
    factor, elsewhere = found
    if not math.isfinite(factor):
        return f"{name}: its steps are not finite where weights are removed; use another optimizer"
    line = f"{name}: removed weights count in its steps: with {1 - density:.1%} of them the kept ones go"
    far = "as far" if abs(factor - 1) < 0.1 else f"{factor:{'.2g' if factor < 100 else '.0f'}} times as far"
    if elsewhere < 0.1:
        remedy = f"; dividing the learning rate by {factor:.2g} makes up for it" if factor > 1.25 else ""
        return f"{line} {far} as they would alone{remedy}"
    return f"{line} {far} as they would alone, and another way; a learning rate that is right for a dense network may not be"


def _late_line(optimizer: Any, weight: nn.Parameter) -> str:
    try:
        times = late(optimizer, weight)
    except Exception:
        return ""
    if times < _FAR:
        return ""
    name = type(optimizer).__name__
    return f"{name}: weights that grow late go {times:.0f} and more times as far in their first step as new ones"


def _rate(optimizer: Any, weight: nn.Parameter) -> Any:
    """A learning rate to try: a warm-up begins at 0."""
    group = group_of(optimizer, weight)
    rates = (group.get("initial_lr"), group.get("lr"), getattr(optimizer, "defaults", {}).get("lr"), 1e-3)
    return next(rate for rate in rates if rate)


def _way(optimizer: Any, weight: nn.Parameter, keep: Tensor) -> Tensor:
    """Where the kept entries of a small parameter go, whose others are removed."""
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    count = int(keep.sum())
    given = {"lr": _rate(optimizer, weight)} if "lr" in group_of(optimizer, weight) else {}
    numbers = wave([(_STEPS + 2) * count], dtype)
    with quiet():
        probe = nn.Parameter(torch.zeros(keep.shape, dtype=dtype).masked_scatter(keep, numbers))
        made, start = twin(optimizer, weight, probe, **given), probe.detach()[keep].clone()
        for turn in range(1, _STEPS + 1):
            slope = torch.zeros(keep.shape, dtype=dtype).masked_scatter(keep, numbers[turn * count :])
            take_step(made, probe, slope, keep)
            probe.mul_(keep)
        return (probe.detach()[keep] - start).double()
