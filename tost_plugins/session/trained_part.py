"""Which of the weights that a mask hides train, where only some of them do; the others stand still."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tost_plugins.masks.base import Exploring
from tost_plugins.session import buffers
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training import ranks


class TrainedPart:
    """Weights that train, kept and hidden ones: as bools in the model's buffers, and ready to multiply with.

    Every hidden weight waits in its buffer; with a step only those of this part come into the network.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], method: Exploring) -> None:
        self.weights, self.method = dict(weights), method
        self.masks = buffers.beside(model, self.weights, buffers.TRAINED)
        self._factors: dict[str, Tensor] = {}

    def factor(self, name: str) -> Tensor:
        """1 where a weight trains, 0 elsewhere, laid out as the weight is."""
        found, weight = self._factors.get(name), self.weights[name].detach()
        if found is None or found.dtype != weight.dtype:
            found = self._factors[name] = torch.empty_like(weight).copy_(self.masks[name])
        return found

    @torch.no_grad()
    def choose(self, mask: Mapping[str, Tensor], optimizers: Optimizers | None) -> None:
        """Choose anew, with all weights in the network; what begins or ceases to train starts anew with the optimizer."""
        for name, new in self.method.trained(mask, {name: self.weights[name].detach() for name in mask}).items():
            old = self.masks[name]
            if optimizers is not None:
                optimizers.renew(self.weights[name], old ^ new, ~(old | new))
            old.copy_(new)
            self._factors.pop(name, None)

    def share(self) -> None:
        """Every rank has rank 0's."""
        for name, value in ranks.broadcast(self.masks, next(iter(self.weights.values())).device).items():
            self.masks[name].copy_(value)
        self._factors.clear()

    @torch.no_grad()
    def reveal(self, hidden: Mapping[str, Tensor]) -> None:
        """Take those that train into the network."""
        weights: list[Tensor] = [self.weights[name] for name in hidden]
        torch._foreach_addcmul_(weights, list(hidden.values()), [self.factor(name) for name in hidden])

    @torch.no_grad()
    def pull(self, hidden: Mapping[str, Tensor], scale: float) -> None:
        """Draw the weights in the network to 0, by their gradients, which are `scale` times as large as they count."""
        seen, unseen = self.method.pulls
        found = {name: grad for name in hidden if (grad := self.weights[name].grad) is not None} if unseen else {}
        if found:
            grads = list(found.values())
            torch._foreach_add_(grads, [self.weights[name] for name in found], alpha=seen * scale)
            waiting, factors = [hidden[name] for name in found], [self.factor(name) for name in found]
            torch._foreach_addcmul_(grads, waiting, factors, value=(unseen - seen) * scale)

    @torch.no_grad()
    def conceal(self, hidden: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Take what is not kept out of the network; whatever an optimizer did to weights that do not train is lost."""
        for name, waiting in hidden.items():
            weight = self.weights[name]
            waiting.lerp_(weight, self.factor(name))  # exactly one of the two
            waiting.sub_(weight.mul_(kept[name]))
