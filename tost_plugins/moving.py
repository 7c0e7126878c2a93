"""What a session does when its mask moves: new masks into the buffers, and weights that train out of sight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tost_plugins import buffers, ranks, seeds, sharding
from tost_plugins.clock import Clock
from tost_plugins.masks.base import Moving
from tost_plugins.params import owners


class Layers(NamedTuple):
    """Name of a weight -> the weight, and what the model keeps beside it. `kept` is the mask in the weight's dtype."""

    weights: dict[str, nn.Parameter]
    masks: dict[str, Tensor]
    kept: dict[str, Tensor]
    seen: dict[str, Tensor]
    owners: dict[
        str, nn.Module
    ]  # of the hidden weights, if the method hides any: another dtype puts others in their place
    changed: Tensor

    @classmethod
    def of(cls, model: nn.Module, params: dict[str, nn.Parameter], kept: dict[str, Tensor], method: Moving) -> Layers:
        """Those of an attached model."""
        masks, seen = (buffers.beside(model, params, which) for which in (buffers.MASK, buffers.SEEN))
        holders = owners(model, params) if method.hides else {}
        return cls(params, masks, kept, seen, holders, getattr(model, buffers.CHANGED))

    def hidden(self) -> dict[str, Tensor]:
        """Name -> the weight where it is removed, 0 elsewhere."""
        return {name: getattr(module, buffers.HIDDEN) for name, module in self.owners.items()}


@torch.no_grad()
def move(layers: Layers, method: Moving, grads: Mapping[str, Tensor], clock: Clock, seed: int) -> None:
    """Put the method's next mask into the buffers.

    Randomness comes from the seed and the step alone. Every rank gets rank 0's mask, except after each step of a
    method that hides weights: there it follows from weights that are equal on all ranks.
    """
    weights, grads = ({n: sharding.whole(t) for n, t in tensors.items()} for tensors in (layers.weights, grads))
    new = method.update(layers.masks, weights, grads, clock, seeds.generator(seed, clock.step))
    if not method.hides or method.settled(clock):
        new = ranks.broadcast(new, next(iter(layers.weights.values())).device)
    layers.changed.copy_(torch.stack([(mask ^ layers.masks[name]).sum() for name, mask in new.items()]).sum())
    for name, mask in new.items():
        layers.masks[name].copy_(mask)
        layers.kept[name].copy_(sharding.like(mask, layers.kept[name]))
        layers.seen[name].logical_or_(mask)


@torch.no_grad()
def reveal(layers: Layers) -> None:
    """Give the optimizer all weights to work on."""
    hidden = list(layers.hidden().values())
    torch._foreach_add_(list(layers.weights.values()), hidden)
    torch._foreach_zero_(hidden)


@torch.no_grad()
def hide(layers: Layers) -> None:
    """Take the removed weights out of the network and remember them."""
    for name, hidden in layers.hidden().items():
        hidden.copy_(layers.weights[name]).masked_fill_(layers.masks[name], 0)
        layers.weights[name].mul_(layers.kept[name])


@torch.no_grad()
def share(layers: Layers) -> None:
    """Give every rank rank 0's hidden weights: what DDP sends when it wraps a model are those in the network."""
    hidden = layers.hidden()
    for name, value in ranks.broadcast(hidden, next(iter(layers.weights.values())).device).items():
        hidden[name].copy_(value)


@torch.no_grad()
def metrics(layers: Layers) -> dict[str, float]:
    """How many entries the last move has changed, and the share of the weights that have ever been kept."""
    seen = torch.stack([seen.sum() for seen in layers.seen.values()]).sum()
    explored = int(seen) / sum(seen.numel() for seen in layers.seen.values())
    return {"tost/mask/changed": float(layers.changed), "tost/mask/explored": explored}
