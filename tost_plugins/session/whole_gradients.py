"""Averages of whole gradients, for a mask that moves by them, while everybody else sees those of the kept weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tost_plugins.session import buffers
from tost_plugins.training import ranks, sharding


class WholeGradients:
    """A gradient is copied as it arrives, before it is masked; when a step is taken the copies go into the averages.

    The averages are buffers beside the weights, looked up by `owners` since a model that changes its dtype puts others in
    their place. They are the same on every rank.
    """

    def __init__(self, owners: Mapping[str, nn.Module], momentum: float) -> None:
        self.owners, self.momentum = owners, momentum
        self._copies: dict[str, Tensor] = {}
        self._step = -1  # the last one whose gradients were taken: a closure may come by twice

    @property
    def averages(self) -> dict[str, Tensor]:
        """Name -> the average."""
        return buffers.of(self.owners, buffers.MOMENTUM)

    @torch.no_grad()
    def arrives(self, name: str, grad: Tensor, kept: Tensor, goes_on: bool) -> None:
        """Copy a gradient; where it `goes_on`, of several micro-batches, that of the kept weights is the sum already."""
        before = self._copies.get(name) if goes_on else None
        self._copies[name] = grad.detach().clone() if before is None else before.mul_(kept == 0).add_(grad)

    def skip(self) -> None:
        """The step is not taken."""
        self._copies.clear()

    @torch.no_grad()
    def take(self, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], step: int, scale: float) -> None:
        """Let the gradients of this step into the averages, once; one that came another way is what it is.

        They are made as large as those that the optimizer gets, which may have been clipped, and that were scaled with the
        loss; an optimizer that undoes that itself says the `scale`.
        """
        copies, self._copies = self._copies, {}
        if step == self._step:
            return
        self._step, alone = step, ranks.world() == 1
        whole, shared = {}, {}
        for name, weight in weights.items():
            copy = copies.get(name, weight.grad if alone else None)
            copy = torch.zeros_like(weight) if copy is None else copy
            if sharding.is_part(copy):
                whole[name] = sharding.whole(copy)
            else:
                shared[name] = copy
        whole |= ranks.mean(shared) if shared else {}
        averages = self.averages
        into, share = [averages[name] for name in whole], 1 - self.momentum
        factor = _factor(whole, weights, kept) / scale
        if factor == 1:
            torch._foreach_lerp_(into, list(whole.values()), share)
        else:
            torch._foreach_mul_(into, self.momentum)
            torch._foreach_add_(into, list(whole.values()), alpha=share * factor)


def _factor(copies: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> float:
    """How many times as large the gradients are as when they came, by the largest of a small layer's kept weights."""
    for name in sorted(copies, key=lambda name: copies[name].numel()):
        grad = weights[name].grad
        if grad is not None:
            came = float((copies[name] * sharding.whole(kept[name])).abs().max())
            now = float((sharding.whole(grad) * sharding.whole(kept[name])).abs().max())
            if came and now:
                return now / came
    return 1.0
