"""Is it the structure or the weights? What a cell starts with beside its own recipe."""

from __future__ import annotations

import torch
from torch import nn

from tost_plugins.masks.mask import Mask
from tost_plugins.masks.restart import constant_sign
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


@torch.no_grad()
def start_with_signs(model: nn.Module, mask: Mask | None) -> None:
    """Give the model's weights, all of them or the mask's layers, their `constant_sign`."""
    weights = prunable(model)
    for name, value in constant_sign(weights, mask or Mask.dense(weights)).items():
        weights[name].copy_(value)
