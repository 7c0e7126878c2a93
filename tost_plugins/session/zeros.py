"""Removed weights stay exactly 0, without multiplying all of them in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from tost_plugins.session.optimizing import Masked, mask_weights, state_of
from tost_plugins.training.sharding import local

LARGE = 2**15  # weights; multiplying fewer is as fast as looking
PARTS = 64


class Zeros:
    """Sees after each step that weights, and what the optimizer keeps of them, are exactly 0 outside the masks.

    They stay so by themselves: without gradient and momentum an optimizer moves no weight that is 0. Multiplying all of them
    in each step costs as much as the optimizer's own work, which a CPU feels. So of a large layer there one of 64 parts is
    looked at, another one each time, and all of it is multiplied when a removed number is not 0: an optimizer that adds
    noise, or somebody who wrote into weights. Small layers are multiplied in each step, and all of them on other devices:
    they multiply faster than the CPU can wait for what they saw.
    """

    def __init__(self, masked: Sequence[Masked]) -> None:
        large = [local(param).is_cpu and local(param).numel() >= LARGE for param, _ in masked]
        self.large = [pair for pair, is_large in zip(masked, large, strict=True) if is_large]
        self.others = [pair for pair, is_large in zip(masked, large, strict=True) if not is_large]
        self.turn = 0

    def watch(self, optimizer: Optimizer | None) -> None:
        """After a step in which gradients were masked and the masks have not moved."""
        found = [pair for pair in self.large if not self._holds(pair, optimizer)]
        mask_weights([*self.others, *found], optimizer)
        self.turn += 1

    @torch.no_grad()
    def _holds(self, pair: Masked, optimizer: Optimizer | None) -> bool:
        param, mask = pair
        total = len(local(mask))
        rows = math.ceil(total / PARTS)
        start = self.turn % math.ceil(total / rows) * rows
        kept = local(mask)[start : start + rows]

        def holds(value: Tensor) -> bool:
            part = local(value.detach())[start : start + rows]
            return torch.equal(part * kept, part)

        return all(map(holds, (param, *state_of(param, optimizer))))
