"""A mask that is learned on weights that never train: edge-popup."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import count_true, top_k, top_mask
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EdgePopup:
    """Weights stay what they are at the start; each has a score that trains, and a layer keeps those of the highest scores.

    A score's gradient is the weight times the gradient by the weight in the network, whether it is kept or not
    (straight-through), so that a removed weight that would help rises. Scores take SGD's steps with momentum; biases
    and norms train by the run's own optimizer, which finds no gradients at the weights. They are bit-equal in the end.

    Fields: `sparsity` in [0, 1), 0 is dense; `weights`, "signed_constant" gives all weights of a layer with n inputs
    of which the share k is kept the size sqrt(2 / (k n)) and the sign that they have, "own" takes them as they are;
    `learning_rate` of the scores, above 0, which falls with half a cosine to 0; `until`, when it is 0 and the mask stops
    moving;
    `momentum` in [0, 1); `weight_decay`, which draws scores to 0, from 0 (not at all); `allocation`, each layer's
    share: "uniform", "er", "erk" or a map, not "global"; `ignore`, globs of layers that train as usual; `on_collapse`,
    for a layer that loses everything. A score starts between 0 and 1 / sqrt(n), at random; those of a given mask's
    removed weights below 0.

    Paper: Ramanujan et al., What's Hidden in a Randomly Weighted Neural Network?, CVPR 2020.
    Differs from the paper: norms and biases train, where the paper's networks have none that do. A score may fall
    below 0 and is the lower for it, where the authors' code compares |score|. Constants count the kept inputs alone,
    the variant that the paper calls scaled.

    Example:
        >>> layer, done = EdgePopup(sparsity=0.5), Clock(step=3, total_steps=10)
        >>> new = layer.update({"w": torch.tensor([True, False])}, {"w": torch.tensor([0.2, 0.3])}, {}, done, None)
        >>> new["w"].tolist(), layer.settled(done)
        ([False, True], False)
    """

    takes_step: ClassVar[bool] = False
    hides: ClassVar[bool] = False

    kind: Literal["edge_popup"] = "edge_popup"
    sparsity: Sparsity
    allocation: Allocation = "uniform"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    weights: Literal["signed_constant", "own"] = "signed_constant"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 1e-4
    until: TimeField = Time(1, "dur")

    @field_validator("allocation")
    @classmethod
    def _by_layer(cls, value: Allocation) -> Allocation:
        if value == "global":
            raise ValueError("expected a share for each layer, got 'global'; use uniform, er, erk or a map")
        return value

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The highest of the first scores: a random choice."""
        return top_mask(self.first_scores(task.params, generator), self.sparsity, self.allocation, self.on_collapse)

    def first_scores(self, weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The scores before the first step, on the CPU; the same generator state gives the same ones."""
        return {name: torch.rand(w.shape, generator=generator) / math.sqrt(_inputs(w)) for name, w in weights.items()}

    @torch.no_grad()
    def prepare(self, weights: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
        """Write into the weights what they are for the whole run."""
        for name, weight in weights.items() if self.weights == "signed_constant" else ():
            share = max(1, int(mask[name].sum())) / weight.numel()
            size = torch.tensor(math.sqrt(2 / (share * _inputs(weight))), dtype=weight.dtype, device=weight.device)
            weight.copy_(torch.where(torch.real(weight) < 0, -size, size))

    def learn(self, scores: list[Tensor], speeds: list[Tensor], slopes: list[Tensor], clock: Clock) -> None:
        """A step of SGD with momentum: `slopes` are the scores' gradients, `speeds` their momenta; both others change."""
        rate = self.learning_rate * (1 + math.cos(math.pi * clock.progress(self.until))) / 2
        torch._foreach_mul_(speeds, self.momentum)
        torch._foreach_add_(speeds, slopes)
        torch._foreach_add_(speeds, scores, alpha=self.weight_decay)
        torch._foreach_add_(scores, speeds, alpha=-rate)

    def due(self, clock: Clock) -> bool:
        """After every step up to `until`."""
        return 0 < clock.step <= self.until.steps(clock)

    def settled(self, clock: Clock) -> bool:
        """From `until` on."""
        return clock.step >= self.until.steps(clock)

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """As many weights as before in every layer, those of the highest scores, which come as `weights`."""
        return {
            name: top_k(weights[name].flatten(), int(count_true(kept)), kept.flatten()).view(kept.shape)
            for name, kept in mask.items()
        }


def _inputs(weight: Tensor) -> int:
    """How many numbers an output of the layer is made of."""
    return max(1, weight[:1].numel())
