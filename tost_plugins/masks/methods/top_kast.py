"""A mask of the largest weights, beside which the next larger ones train out of sight: Top-KAST."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import count_true, top_k, top_mask
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TopKast:
    """The forward pass sees each layer's largest weights; gradients reach somewhat more of them, the rest stand still.

    Now and then the weights are ranked anew: the largest are kept, the next larger ones train out of sight, and may be among
    the largest next time. The smallest keep their values, out of sight as well; they come in when others have shrunk. For
    that weights that train are drawn to 0, those out of sight 1 / (1 - sparsity) times as strongly: the gradient of
    decay / 2 * w^2, or of that many times it, is added to theirs. What the optimizer keeps of a weight that begins or ceases
    to train starts anew. The mask moves to the end, and the network ends with the kept weights alone.

    Fields: `sparsity` of the forward pass in [0, 1), 0 is dense; `backward`, the share of weights that do not train, from 0
    (all train) to below `sparsity`, by default such that twice as many train as are kept; `decay`, 0 for none, beside what the
    optimizer's own weight decay does to all that train; `every`, the time between two rankings; `allocation`, each layer's
    share: "uniform", "er", "erk" or a map, not "global"; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer
    that loses everything.

    Paper: Jayakumar et al., Top-KAST: Top-K Always Sparse Training, NeurIPS 2020.
    Differs from the paper: "erk" shares by default, where its layers all have the same density; a layer trains as many times
    more weights than it keeps as the network does, at most all.

    Example:
        >>> layer, weight = TopKast(sparsity=0.5, backward=0.25), {"w": torch.tensor([1.0, -4.0, 2.0, 3.0])}
        >>> new = layer.update({"w": torch.tensor([True, True, False, False])}, weight, {}, Clock(100), torch.Generator())
        >>> new["w"].tolist(), layer.trained(new, weight)["w"].tolist()
        ([False, True, False, True], [False, True, True, True])
    """

    takes_step: ClassVar[bool] = False
    hides: ClassVar[bool] = True

    kind: Literal["top_kast"] = "top_kast"
    sparsity: Sparsity
    backward: Sparsity | None = None
    allocation: Allocation = "erk"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    every: TimeField = Time(100, "ba")
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 1e-4

    @field_validator("allocation")
    @classmethod
    def _by_layer(cls, value: Allocation) -> Allocation:
        if value == "global":
            raise ValueError("expected a share for each layer, got 'global'; use uniform, er, erk or a map")
        return value

    @model_validator(mode="after")
    def _more_train(self) -> TopKast:
        if self.backward is not None and self.sparsity and self.backward >= self.sparsity:
            raise ValueError(
                f"expected backward below sparsity, {self.sparsity}, got {self.backward!r}; lower backward"
            )
        return self

    @property
    def pulls(self) -> tuple[float, float]:
        """How strongly weights are drawn to 0: those that are kept, and those that train out of sight."""
        return self.decay, self.decay / (1 - self.sparsity)

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """Each layer's largest weights."""
        sizes = {name: param.detach().abs() for name, param in task.params.items()}
        return top_mask(sizes, self.sparsity, self.allocation, self.on_collapse)

    def due(self, clock: Clock) -> bool:
        """At every multiple of `every`, not at the start."""
        return clock.step > 0 and clock.step % max(1, self.every.steps(clock)) == 0

    def settled(self, clock: Clock) -> bool:
        """Never."""
        return False

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """As many weights as before in every layer, the largest of them all."""
        sizes = {name: wide(weights[name].detach()).abs().flatten() for name in mask}
        return {
            name: top_k(sizes[name], int(count_true(kept)), kept.flatten()).view(kept.shape)
            for name, kept in mask.items()
        }

    def trained(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask's weights, and the next larger ones of each layer."""
        times = (
            min(2.0, 1 / (1 - self.sparsity)) if self.backward is None else (1 - self.backward) / (1 - self.sparsity)
        )
        found = {}
        for name, kept in mask.items():
            count = int(count_true(kept))
            more = min(round(times * count), kept.numel()) - count
            others = wide(weights[name].detach()).abs().masked_fill(kept, -1)
            found[name] = kept | top_k(others.flatten(), more).view(kept.shape)
        return found
