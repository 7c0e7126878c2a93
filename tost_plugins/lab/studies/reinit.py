"""Is it the structure or the weights? What a sparse network is started with again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tost_plugins.masks.mask import Mask


def shuffled(mask: Mask, generator: torch.Generator) -> Mask:
    """A random mask that keeps as many weights in every layer as this one.

    Example:
        >>> mask = Mask({"w": torch.tensor([[True, True, False, False, False, False]])})
        >>> shuffled(mask, torch.Generator().manual_seed(0)).kept
        2
    """
    return Mask({
        name: keep.flatten()[torch.randperm(keep.numel(), generator=generator)].view(keep.shape)
        for name, keep in mask.items()
    })  # fmt: skip


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
