"""The state of torch's global random generators: taken with a checkpoint, and put back."""

from __future__ import annotations

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
