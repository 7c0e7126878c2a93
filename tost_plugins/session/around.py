"""What tweaks do around an optimizer's step: once for each of its gradients, and not where the step is not taken."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training.clock import Clock
from tost_plugins.training.sharding import local
from tost_plugins.tweaks.base import Step


class AroundSteps:
    """The tweaks' two moments in a run. A gradient that they have seen is not shown to them again, however often a loop says
    that the step is near, unless it has changed since: closures compute a new one each time."""

    def __init__(self, tweaks: ActiveTweaks) -> None:
        self.tweaks = tweaks
        self.taken = False  # whether the step at hand is taken, as far as anybody knows
        self._seen: dict[str, tuple[weakref.ref[Tensor], int]] = {}  # gradients as tweaks have left them
        self._kept: Mapping[str, Tensor] = {}  # copies of them: optimizers may write into their gradients
        self._room: dict[str, Tensor] = {}  # where they lie in every step: new memory costs more than the copy
        self._rates: Mapping[int, float] = {}  # of the step at hand: schedules may move on before it is told

    def before(self, model: nn.Module, weights: MaskedWeights, clock: Clock, optimizers: Optimizers | None,
               check_finite: bool) -> None:  # fmt: skip
        """With gradients final and masked. `check_finite=False`: a loss scaler is there, which skips steps with NaN and Inf."""
        self.taken = optimizers is not None and self.tweaks.around_steps and not optimizers.sits_out
        self.taken = self.taken and (check_finite or not optimizers.not_finite(model))  # type: ignore[union-attr]
        if optimizers is None or not self.taken:
            return
        self._rates, found = optimizers.rates(), {n: w.grad for n, w in weights.weights.items() if w.grad is not None}
        fresh = {name: grad for name, grad in found.items() if not self._was_seen(name, grad)}
        if fresh:
            self.tweaks.before_step(self._step(weights, fresh, clock))
            weights.settle()
            self._seen = {name: (weakref.ref(grad), _version(grad)) for name, grad in found.items()}
        if self.tweaks.after_steps:
            self._kept = {} if optimizers.scaled else self._copies(found)

    def after(self, weights: MaskedWeights, clock: Clock) -> None:
        """When the optimizer has stepped; one that takes a loss scaler's factor out by itself has done so in place."""
        taken, self.taken = self.taken, False
        kept, self._kept = self._kept, {}
        if taken and self.tweaks.after_steps:
            grads = kept or {n: w.grad for n, w in weights.weights.items() if w.grad is not None}
            self.tweaks.after_step(self._step(weights, grads, clock))

    def _was_seen(self, name: str, grad: Tensor) -> bool:
        seen, version = self._seen.get(name, (lambda: None, -1))
        return seen() is grad and version == _version(grad)

    @torch.no_grad()
    def _copies(self, grads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each rank's parts of them."""
        parts = {name: local(grad) for name, grad in grads.items()}
        if {name: _kind(part) for name, part in parts.items()} != {n: _kind(room) for n, room in self._room.items()}:
            self._room = {name: torch.empty_like(part) for name, part in parts.items()}
        if parts:
            torch._foreach_copy_([self._room[name] for name in parts], list(parts.values()))
        return self._room

    def _step(self, weights: MaskedWeights, grads: Mapping[str, Tensor], clock: Clock) -> Step:
        rates = self._rates
        return Step(weights.weights, weights.kept, grads, lambda param: rates.get(id(param), 0.0), clock, weights.made)


def _version(grad: Tensor) -> int:
    return local(grad)._version


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
