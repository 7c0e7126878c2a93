"""Weights that never train under a mask that follows scores, which do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.masks.base import Scored
from tost_plugins.masks.topk import count_true, top_k
from tost_plugins.session import buffers
from tost_plugins.session.moving import MovingWeights
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.wiring import Wiring
from tost_plugins.training import ranks
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import owners


class ScoredWeights(MovingWeights):
    """The masked weights of a session whose method is `Scored`. Beside each weight, in buffers, are its value for the whole
    run, its score and the score's momentum; the network has the values of the kept ones, and 0.

    The gradients of a step go into the scores before it and are gone then; the mask moves after it.
    """

    def __init__(
        self, model: nn.Module, weights: dict[str, nn.Parameter], method: Scored, seed: int, wiring: Wiring
    ) -> None:
        super().__init__(model, weights, method, seed, wiring)
        self.method: Scored = method
        self.owners = owners(model, dict(weights))
        self._stateless = True  # the optimizer keeps nothing of these weights yet

    @property
    def restless(self) -> bool:
        return not self.method.settled(self.clock)

    def wants_dense(self) -> bool:
        return self.restless

    def begin(self, clock: Clock, optimizers: Optimizers | None, fresh: bool) -> None:
        """At the start of a run (`fresh`) all weights are in the network."""
        self.clock = clock
        if fresh:
            self._take_values()
            self._take_scores()
            self._after(clock, None)
        self.zero()
        if fresh:
            self.forget(optimizers)

    @torch.no_grad()
    def _take_values(self) -> None:
        """The weights in the network stay what they are, rank 0's everywhere."""
        here = {name: weight.detach() for name, weight in self.weights.items()}
        if ranks.world() > 1:
            here = ranks.broadcast(here, next(iter(here.values())).device)
        for name, values in self._beside(buffers.FIXED).items():
            values.copy_(here[name])

    @torch.no_grad()
    def _take_scores(self) -> None:
        """The method's first scores; where another mask was given, its removed weights have scores below all others'."""
        drawn = self.method.first_scores(self.weights, torch.Generator().manual_seed(self.seed))
        for name, scores in self._beside(buffers.SCORES).items():
            scores.copy_(drawn[name])
            kept = self.masks[name]
            if not torch.equal(top_k(scores.flatten(), int(count_true(kept))).view(kept.shape), kept):
                scores.mul_(torch.where(kept, 1, -1))
        torch._foreach_zero_(list(self._beside(buffers.SPEEDS).values()))

    @torch.no_grad()
    def before_step(self, optimizers: Optimizers | None = None, check_finite: bool = True) -> None:
        """With final gradients: scores learn from them, once in a step, and the optimizer finds none (zeros once, so that it
        has a state to save). A step that a loss scaler is to skip teaches nothing."""
        skipped = not check_finite and optimizers is not None and bool(optimizers.not_finite(self.model))
        if self.restless and not skipped and self._moved_at != self.clock.step:
            self._moved_at = self.clock.step
            self._learn(1.0 if optimizers is None else optimizers.scale)
        for weight in self.weights.values():
            if self._stateless and weight.grad is not None and not skipped:
                weight.grad = torch.zeros_like(weight)
            else:
                weight.grad = None

    def _learn(self, scale: float) -> None:
        parts = (self._beside(which) for which in (buffers.SCORES, buffers.SPEEDS, buffers.FIXED))
        scores, speeds, values = parts
        seen = {
            n: weight.grad for n, weight in self.weights.items() if weight.grad is not None and weight.requires_grad
        }
        slopes = [torch.real(grad.conj() * values[name]).to(scores[name]) / scale for name, grad in seen.items()]
        if slopes:
            self.method.learn([scores[name] for name in seen], [speeds[name] for name in seen], slopes, self.clock)

    def stepped(self, optimizers: Optimizers | None) -> None:
        """Weights that never move have no averages."""

    def after_step(self, clock: Clock, optimizers: Optimizers | None = None) -> None:
        """When a step is done: the mask follows the scores, and the weights are what they were."""
        if clock.step != self.clock.step:
            self._after(clock, None)
        if self._stateless and optimizers is not None:
            self._renew(optimizers)
            self._stateless = not any(map(optimizers.remember, self.weights.values()))
        self.zero()

    def _renew(self, optimizers: Optimizers) -> None:
        """What the optimizer has made of zeros and its weight decay is nothing to go on with."""
        for weight in self.weights.values():
            if optimizers.remember(weight):
                all_ = torch.ones_like(weight, dtype=torch.bool)
                optimizers.renew(weight, all_, ~all_)

    @torch.no_grad()
    def zero(self, diverged: bool = False) -> None:
        """The kept weights are those of the start, to the bit, whatever the optimizer did; the others 0."""
        weights: list[Tensor] = list(self.weights.values())
        values = self._beside(buffers.FIXED)
        torch._foreach_copy_(weights, [values[name] for name in self.weights])
        torch._foreach_mul_(weights, list(self.kept.values()))

    def _looked_at(self) -> dict[str, Tensor]:
        return self._beside(buffers.SCORES)

    def _beside(self, which: str) -> dict[str, Any]:
        return buffers.of(self.owners, which)
