"""What an optimizer keeps for each weight, and what it keeps for a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.session.trial import quiet, take_step, twin, wave


def numbers(weight: Tensor, state: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point numbers, one for each of a weight's, in an optimizer's state of it, however nested, by their keys."""
    if isinstance(state, Tensor):
        plain = type(state) in (Tensor, nn.Parameter) or hasattr(state, "device_mesh")  # others hold a few bits
        if plain and state.shape == weight.shape and state.is_floating_point():
            yield key, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from numbers(weight, value, str(name))
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from numbers(weight, value, key)


def start_values(optimizer: Any, weight: nn.Parameter) -> dict[str, float]:
    """Key -> the number that an optimizer keeps for a weight which has never had a gradient: 0 for momentum, the learning rate
    for Rprop's steps. A key is missing where its numbers do not stand for single weights, as in a rotated basis, or change
    with time.

    It is tried out: an optimizer of the same kind and settings trains a small parameter half of whose gradients are 0.

    Example:
        >>> weight = nn.Parameter(torch.ones(4, 4))
        >>> start_values(torch.optim.Rprop([weight], lr=0.5), weight)
        {'prev': 0.0, 'step_size': 0.5}
    """
    shape = [
        min(side, 5 - 2 * (place % 2)) for place, side in enumerate(weight.shape)
    ]  # no square: it may mean something
    numbers_of = wave([4 * torch.Size(shape).numel()], weight.dtype).view(4, *shape)
    keep = torch.arange(numbers_of[0].numel()).view(shape) % 2 == 0
    try:
        with quiet():
            probe = nn.Parameter(numbers_of[0] * keep)
            made = twin(optimizer, weight, probe)
            found: list[dict[str, Tensor]] = []
            for slope in numbers_of[1:]:
                take_step(made, probe, slope * keep, keep)
                probe.mul_(keep)
                found.append({key: value[~keep].clone() for key, value in numbers(probe, made.state.get(probe))})
    except Exception:  # somebody's class, made in another way
        return {}
    return {
        key: idle[0].item()
        for key, idle in found[-1].items()
        if idle.numel() and bool((idle == idle[0]).all()) and torch.equal(idle, found[0].get(key, idle))
    }
