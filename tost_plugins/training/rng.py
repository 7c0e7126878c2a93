"""The states of the global random generators: taken with a checkpoint, or while something looks, and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def states() -> list[Tensor]:
    """That of the CPU, then those of all GPUs."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def restore(states: list[Tensor]) -> None:
    """Put back what `states` returned; on another number of GPUs that of the CPU alone.

    Example:
        >>> before = states()
        >>> first = torch.rand(1)
        >>> restore(before)
        >>> torch.rand(1) == first
        tensor([True])
    """
    torch.set_rng_state(states[0])
    if len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Within: the random generators of torch, numpy and Python (on the CPU and on this device), newly seeded; they return.

    What a look draws depends on nothing that ran before. Only generators that are put back are seeded: `torch.manual_seed`
    would reach those of all devices, and of ones that are not in use yet.
    """
    before = everywhere(device)
    try:
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield
    finally:
        put_back(before, device)


def everywhere(device: torch.device) -> tuple[Any, ...]:
    """The states of Python's, numpy's and torch's generators, on the CPU and on this device."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device


def put_back(states: tuple[Any, ...], device: torch.device) -> None:
    """Return to what `everywhere` gave."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)
