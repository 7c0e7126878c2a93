"""A mask that comes and goes: alternating compressed and decompressed training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import choose, counts, dense_layers, split, tell, top_mask
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AcDc:
    """Dense and sparse phases take turns: the largest weights stay for a while, then all may train again; it ends sparse.

    The network is dense up to `begin`. From there a sparse phase and a dense one, each as long as `every`, follow each other
    as often as both end by `until`; what is left before `until` is dense, and from `until` on the network is sparse for
    good. A sparse phase begins with the largest magnitudes of that moment. A dense one begins with the removed weights at 0
    and with no momentum of any weight (`momentum_buffer`, `exp_avg`). A change follows a step's weight update.

    Where less than 0.9 of the largest weights of all layers lie on a path (a small network at a high sparsity), the phase has
    the largest of each layer, shared out by "erk", in place of them.

    Fields: `sparsity` of the sparse phases in [0, 1), 0 is dense; `begin`, when the first of them starts, at 0 with the
    first step; `every`, the length of a phase; `until`, when the last one starts; `allocation`, how the kept weights are
    shared out each time, "global" compares all layers; `ignore`, globs of layers to leave alone; `on_collapse`, for a
    layer that loses everything.

    Paper: Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, NeurIPS 2021.
    Differs from the paper: what is done where few of the largest weights lie on a path; times are shares of the run, those of its
    100 epochs on ImageNet (10 dense, then phases of 5, the last dense one of 10, the last sparse one of 15).

    Example:
        >>> layer = AcDc(sparsity=0.9, begin="10ba", every="5ba", until="85ba")
        >>> [step for step in range(100) if layer.due(Clock(step))][-4:], layer.sparse_at(Clock(80))
        ([65, 70, 75, 85], False)
    """

    takes_step: ClassVar[bool] = False
    hides: ClassVar[bool] = False

    kind: Literal["ac_dc"] = "ac_dc"
    sparsity: Sparsity
    allocation: Allocation = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    begin: TimeField = Time(0.1, "dur")
    every: TimeField = Time(0.05, "dur")
    until: TimeField = Time(0.85, "dur")

    @model_validator(mode="after")
    def _in_order(self) -> AcDc:
        if self.begin.unit == self.until.unit and self.begin.value > self.until.value:
            raise ValueError(f"expected begin before until, {self.until}, got {self.begin}; begin earlier")
        return self

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """All weights, or for `begin` at 0 the largest; raises TostError where the allocation cannot give the sparsity."""
        counts(task.params, self.sparsity, self.allocation)
        if self.begin.value:
            return Mask.dense(task.params)
        sizes = {name: param.detach().abs() for name, param in task.params.items()}
        return top_mask(sizes, self.sparsity, self.allocation, self.on_collapse)

    def sparse_at(self, clock: Clock) -> bool:
        """Whether the network is sparse after so many steps."""
        begin, until, every = self.begin.steps(clock), self.until.steps(clock), max(1, self.every.steps(clock))
        pairs, place = divmod(clock.step - begin, 2 * every)
        fits = begin + (pairs + 1) * 2 * every <= until  # and so does the dense phase after it
        return clock.step >= until or (clock.step >= begin and place < every and fits)

    def due(self, clock: Clock) -> bool:
        """Where one phase follows another; at the start only where that is not what the first mask is for."""
        before = self.sparse_at(clock.at(clock.step - 1)) if clock.step else not self.begin.value
        return before != self.sparse_at(clock)

    def settled(self, clock: Clock) -> bool:
        """From `until` on."""
        return clock.step >= self.until.steps(clock)

    def restarts(self, clock: Clock) -> bool:
        """Where a dense phase begins."""
        return not self.sparse_at(clock)

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The largest weights where a sparse phase begins, else all of them."""
        if not self.sparse_at(clock):
            return {name: torch.ones_like(kept) for name, kept in mask.items()}
        return self._largest(mask, weights, self.allocation)

    def instead(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The largest weights of each layer, shared out by "erk", where all layers were compared."""
        return self._largest(mask, weights, "erk") if self.allocation == "global" else None

    def _largest(
        self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], allocation: Allocation
    ) -> dict[str, Tensor]:
        scores = {name: wide(weights[name].detach()).abs() for name in mask}
        count = counts(scores, self.sparsity, allocation)
        flat = torch.cat([score.flatten() for score in scores.values()])
        kept, lost = choose(scores, flat, count, self.on_collapse, dense_layers(scores, count))
        tell(lost)
        return split(kept, scores)
