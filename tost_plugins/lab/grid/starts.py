"""Is it the structure or the weights? What a cell starts with beside its own recipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tost_plugins.masks.mask import Mask
from tost_plugins.training.params import prunable


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


@torch.no_grad()
def start_with_signs(model: nn.Module, mask: Mask | None) -> None:
    """Give the model's weights, all of them or the mask's layers, their `constant_sign`."""
    weights = prunable(model)
    for name, value in constant_sign(weights, mask or Mask.dense(weights)).items():
        weights[name].copy_(value)
