"""A mask that follows the weights: Discovering Neural Wirings, and its hybrid that freezes the structure early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import count_true, top_k, top_mask
from tost_plugins.training.clock import Clock, TimeField
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Dnw:
    """After every step each layer keeps its largest weights; gradients reach the others as well, out of sight.

    The forward pass sees the kept weights only. The gradient that they get is applied to all weights of the layer
    (straight-through), so that a removed one may grow until it is among the largest and takes a place. With `freeze`
    the structure stops moving at that moment and training goes on as with a static mask, at its cost; without it moves
    to the end.

    Fields: `sparsity` in [0, 1), 0 is dense; `freeze`, when the structure stops moving, at 0 before the first step;
    `allocation`, each layer's share: "uniform", "er", "erk" or a map, not "global"; `ignore`, globs of layers to leave
    alone; `on_collapse`, for a layer that loses everything.

    Paper: Wortsman et al., Discovering Neural Wirings, NeurIPS 2019; `freeze`: Van Gelder et al., Deconstructing the
    Structure of Sparse Neural Networks, 2020.
    Differs from the paper: "erk" shares by default, where the paper's networks have the same share in every layer
    ("uniform"), which costs about ten points at 95 % in a short run (docs/methods.md). Removed weights wait in a buffer
    between two steps, so that the network is sparse whenever it is looked at.

    Example:
        >>> layer = Dnw(sparsity=0.5, freeze="1ep")
        >>> new = layer.update({"w": torch.tensor([True, False])}, {"w": torch.tensor([1.0, -2.0])}, {}, Clock(), None)
        >>> new["w"].tolist(), layer.settled(Clock(step=9, steps_per_epoch=10))
        ([False, True], False)
    """

    takes_step: ClassVar[bool] = False
    hides: ClassVar[bool] = True

    kind: Literal["dnw"] = "dnw"
    sparsity: Sparsity
    allocation: Allocation = "erk"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    freeze: TimeField | None = None

    @field_validator("allocation")
    @classmethod
    def _by_layer(cls, value: Allocation) -> Allocation:
        if value == "global":
            raise ValueError("expected a share for each layer, got 'global'; use uniform, er, erk or a map")
        return value

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """Each layer's largest weights."""
        return top_mask(
            {n: p.detach().abs() for n, p in task.params.items()}, self.sparsity, self.allocation, self.on_collapse
        )

    def due(self, clock: Clock) -> bool:
        """After every step up to `freeze`."""
        return clock.step > 0 and (self.freeze is None or clock.step <= self.freeze.steps(clock))

    def settled(self, clock: Clock) -> bool:
        """From `freeze` on."""
        return self.freeze is not None and clock.step >= self.freeze.steps(clock)

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """As many weights as before in every layer, the largest of them all."""
        return {name: _largest(wide(weights[name].detach()).abs(), kept) for name, kept in mask.items()}


def _largest(sizes: Tensor, kept: Tensor) -> Tensor:
    return top_k(sizes.flatten(), int(count_true(kept)), kept.flatten()).view(sizes.shape)
