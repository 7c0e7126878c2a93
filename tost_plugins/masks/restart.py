"""What the kept weights of a lottery ticket start from, other than their own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tost_plugins.masks.mask import Mask

#: Their own values, their layer's deviation with their own signs, each other's values, or new ones.
KeptWeights = Literal["own", "constant_sign", "reshuffled", "new"]


def constant_sign(weights: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Each weight of the layers in `mask` becomes its layer's standard deviation with the weight's own sign.

    The deviation is that of the weights given, before the mask: the signs of an initialisation without its magnitudes.

    Paper: Zhou et al., Deconstructing Lottery Tickets, NeurIPS 2019.
    Differs from the paper: nothing.

    Example:
        >>> weights = {"w": torch.tensor([[3.0, -1.0, 1.0, -3.0]])}
        >>> constant_sign(weights, Mask.dense(weights))["w"].abs().unique().numel()
        1
    """
    return {name: torch.sign(weights[name]) * weights[name].std(correction=0) for name in mask}


def reshuffled(weights: Mapping[str, Tensor], mask: Mask, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights that `mask` keeps change places with each other, within their layer; the others stay.

    Paper: Zhou et al., Deconstructing Lottery Tickets, NeurIPS 2019.
    Differs from the paper: nothing.

    Example:
        >>> weights, mask = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, Mask({"w": torch.tensor([1, 0, 1, 1])})
        >>> new = reshuffled(weights, mask, torch.Generator().manual_seed(0))["w"]
        >>> new[1].item(), new.sort().values.tolist()
        (2.0, [1.0, 2.0, 3.0, 4.0])
    """
    found = {}
    for name, keep in mask.items():
        new, there = weights[name].clone(), keep.to(weights[name].device)
        order = torch.randperm(int(keep.sum()), generator=generator).to(new.device)
        new[there] = weights[name][there][order]
        found[name] = new
    return found


def new(weights: Mapping[str, Tensor], mask: Mask, generator: torch.Generator) -> dict[str, Tensor]:
    """New weights for the layers in `mask`, drawn from a normal distribution with the layer's standard deviation.

    The deviation is that of the weights given, before the mask; the mean is 0.

    Paper: Zhou et al., Deconstructing Lottery Tickets, NeurIPS 2019.
    Differs from the paper: a normal distribution whatever the network was initialised from (theirs were from one).

    Example:
        >>> weights = {"w": torch.tensor([2.0, -2.0] * 500)}
        >>> round(new(weights, Mask.dense(weights), torch.Generator().manual_seed(0))["w"].std().item())
        2
    """
    return {
        name: torch.randn(weights[name].shape, generator=generator).to(weights[name]) * weights[name].std(correction=0)
        for name in mask
    }


@torch.no_grad()
def restart(kind: KeptWeights, weights: Mapping[str, Tensor], mask: Mask, generator: torch.Generator) -> None:
    """Write into the weights what they start from; removed ones are not 0 yet."""
    if kind == "own":
        return
    found = constant_sign(weights, mask) if kind == "constant_sign" else _DRAWN[kind](weights, mask, generator)
    for name, value in found.items():
        weights[name].copy_(value)


_DRAWN = {"reshuffled": reshuffled, "new": new}
