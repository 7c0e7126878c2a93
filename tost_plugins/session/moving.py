"""Masked weights whose mask moves: new masks into the buffers, and weights that train out of sight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Alternating, Averaging, Exploring, Moving
from tost_plugins.masks.topk import count_true
from tost_plugins.session import buffers, checks
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.restarts import restart
from tost_plugins.session.trained_part import TrainedPart
from tost_plugins.session.whole_gradients import WholeGradients
from tost_plugins.session.wiring import Wiring
from tost_plugins.training import ranks, seeds, sharding
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import owners, some


class MovingWeights(MaskedWeights):
    """The masked weights of a running session, as its method moves their mask; all that a checkpoint needs is in the
    model's buffers: the mask, what was ever kept, and the weights that train out of sight."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], method: Moving, seed: int, wiring: Wiring
    ) -> None:
        self.masks, self.seen = (buffers.beside(model, dict(weights), which) for which in (buffers.MASK, buffers.SEEN))
        super().__init__(weights, self.masks)
        self.model, self.method, self.seed, self.wiring = model, method, seed, wiring
        # looked up by owner: a model that changes its dtype puts other buffers in the hidden weights' place
        holders = owners(model, dict(weights))
        self.owners = holders if method.hides else {}
        self.gradients = WholeGradients(holders, method.average_keeps) if isinstance(method, Averaging) else None
        self.part = TrainedPart(model, weights, method) if isinstance(method, Exploring) else None  # None: all train
        self.changed: Tensor = getattr(model, buffers.CHANGED)
        self.clock = Clock()
        self._said = False  # that a mask had to be another one to connect
        self._total: Any = self._count  # how many weights are kept, on the device
        self._numbers: tuple[int, dict[str, float]] | None = None  # what is logged; None: it has moved since
        self._moved_at = -1  # the step at whose gradients the mask has moved: a closure may come by twice
        self._revealed = False  # whether hidden weights are in the network, between gradients and step
        self._all = False  # whether those are, that do not train

    @property
    def count(self) -> int:
        """How many weights are kept."""
        return self._logged()[0]

    def begin(self, clock: Clock, optimizers: Optimizers | None, fresh: bool) -> None:
        """At the start of a run (`fresh`) all weights are in the network; the state before its first step is the same on
        every rank."""
        self.clock = clock
        if fresh:
            self._revealed = self._all = self.hides
            if self.part is not None:
                self.part.choose(self.masks, None)
            self._after(clock, None)
            self._share()
        if self.hides:
            self.zero()
        else:
            super().begin(clock, optimizers, fresh)

    @property
    def restless(self) -> bool:
        """Whether the mask moves at every step now."""
        return self.hides

    @property
    def hides(self) -> bool:
        """Whether removed weights train out of sight now."""
        return self.method.hides and not self.method.settled(self.clock)

    def wants_dense(self) -> bool:
        """Whether gradients are to reach removed weights now: they train, or are to be compared."""
        return (self.hides and self.part is None) or (self.method.takes_step and self.method.due(self.clock))

    def reached(self, name: str) -> Tensor:
        """What is kept, and what trains out of sight."""
        return self.kept[name] if self.part is None else self.part.factor(name)

    def before_step(self, optimizers: Optimizers | None = None, check_finite: bool = True) -> None:
        """With final gradients: mask them, unless they are to reach removed weights too, or the mask moves in place of the
        step. `check_finite=False`: they may hold NaN or Inf, and a loss scaler skips the step then, and the mask with it."""
        if self.gradients is not None and not self.method.settled(self.clock):
            self._average(self.gradients, optimizers, check_finite)
        if self.hides:
            if self.part is not None:
                super().before_step(optimizers, check_finite)
            self._reveal()
            if self.part is not None:
                self.part.pull(self._hidden(), 1.0 if optimizers is None else optimizers.scale)
        elif optimizers is None or not self.wants_dense() or (not check_finite and optimizers.not_finite(self.model)):
            super().before_step(optimizers, check_finite)
        else:
            if self._moved_at != self.clock.step:
                self.zero()  # what grows starts at 0, whatever others have put there
                grads = {name: param.grad for name, param in self.weights.items() if param.grad is not None}
                self._move(grads, self.clock, optimizers)
                self._moved_at = self.clock.step
            optimizers.sit_out()

    def stepped(self, optimizers: Optimizers | None) -> None:
        """Averages of weights that have come back begin again, from what the optimizer has made of these."""
        if optimizers is not None and not self.hides:
            restart(optimizers.inner, self.weights, self.kept)

    def after_step(self, clock: Clock, optimizers: Optimizers | None = None) -> None:
        """When a step is done: move a mask that follows the weights, and hide what it removes."""
        if clock.step != self.clock.step:  # a step told twice moves no mask twice
            self._after(clock, optimizers)
        self.conceal()
        if not self.hides:
            self.zero()

    def _after(self, clock: Clock, optimizers: Optimizers | None) -> None:
        hid, self.clock = self.hides, clock
        if not self.method.takes_step and self.method.due(clock):
            self._reveal_all()
            averages = {} if self.gradients is None else self.gradients.averages
            self._move(averages, clock, None if self.hides else optimizers)
            if self.part is not None:
                self.part.choose({n: m for n, m in self.masks.items() if self.trains(n)}, optimizers)
        if hid and not self.hides:  # what trained out of sight is gone for good
            self.forget(optimizers)
            torch._foreach_zero_(list(self._hidden().values()))
        self.conceal()

    @torch.no_grad()
    def conceal(self) -> None:
        """Take removed weights out of the network and remember them, if they are in it."""
        if self._revealed and self.part is not None and not self._all:
            self.part.conceal(self._hidden(), self.kept)
        elif self._revealed and self.hides:
            for name, hidden in self._hidden().items():
                weight = self.weights[name]
                hidden.copy_(weight)
                hidden.sub_(weight.mul_(self.kept[name]))  # filling in by a mask takes several times as long
        self._revealed = self._all = False

    def exchange(self, swap: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """While an optimizer puts other weights into the network: those out of sight are exchanged with the rest."""
        if not self.hides or self._revealed:
            return swap(*args, **kwargs) if self._revealed else super().exchange(swap, *args, **kwargs)
        self._reveal()
        try:
            return swap(*args, **kwargs)
        finally:
            self.conceal()

    def metrics(self) -> dict[str, float]:
        """How many entries the last move has changed, and the share of the weights that have ever been kept."""
        return self._logged()[1]

    # ---- inside

    def _average(self, gradients: WholeGradients, optimizers: Optimizers | None, check_finite: bool) -> None:
        if not check_finite and optimizers is not None and optimizers.not_finite(self.model):
            gradients.skip()
        else:
            scale = 1.0 if optimizers is None else optimizers.scale
            gradients.take(self.weights, self.kept, self.clock.step, scale)

    def comes(self, name: str) -> None:
        checks.concealed(self.method, self._revealed)
        super().comes(name)

    def _arrives(self, name: str) -> None:
        grad = self.weights[name].grad
        if self.gradients is not None and grad is not None and not self.method.settled(self.clock):
            seen, version = self._arrived.get(name, (lambda: None, -1))
            goes_on = seen() is grad and grad._version == version + 1  # by the gradient that was added to it
            self.gradients.arrives(name, grad, self.kept[name], goes_on)
        super()._arrives(name)

    def _logged(self) -> tuple[int, dict[str, float]]:
        if self._numbers is None:
            seen = sum(int(count_true(mask)) for mask in self.seen.values())
            self._numbers = (
                int(self._total),
                {"tost/mask/changed": float(self.changed), "tost/mask/explored": seen / self.size},
            )
        return self._numbers

    @torch.no_grad()
    def _move(self, grads: Mapping[str, Tensor], clock: Clock, optimizers: Optimizers | None) -> None:
        """Put the method's next mask into the buffers.

        Randomness comes from the seed and the step alone. Every rank gets rank 0's mask, except where it moves after each
        step: there it follows from numbers that are equal on all ranks.
        """
        looked_at = self._looked_at()
        weights, grads = ({n: sharding.whole(t) for n, t in tensors.items()} for tensors in (looked_at, grads))
        moving = {name: mask for name, mask in self.masks.items() if self.trains(name)}
        self._say_frozen([name for name in self.masks if name not in moving])
        generator = seeds.generator(self.seed, clock.step)
        new = self._connected(self.method.update(moving, weights, grads, clock, generator), weights) if moving else {}
        counts, more = [], []
        for name, mask in new.items():
            changed = mask ^ self.masks[name]
            counts.append(count_true(changed))
            more.append(count_true(mask) - count_true(self.masks[name]))
            if optimizers is not None:
                weight, idle = self.weights[name], ~(mask | self.masks[name])
                optimizers.renew(weight, *(sharding.local(sharding.like(part, weight)) for part in (changed, idle)))
            self.masks[name].copy_(mask)
            self.kept[name].copy_(sharding.like(mask, self.kept[name]))
            self.seen[name].logical_or_(mask)
        if optimizers is not None and isinstance(self.method, Alternating) and self.method.restarts(clock):
            optimizers.lose_momentum()
        self.changed.fill_(sum(counts))
        self._total += sum(more)
        self._mask = self._numbers = None
        self.made.clear()

    def _connected(self, new: dict[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method's next mask, or the one at hand where it connects nothing; rank 0 decides, unless it moves at each step."""
        if self.restless or ranks.rank() == 0:
            comes_and_goes = isinstance(self.method, Alternating)
            may = self.wiring.allows(self.masks, {**self.masks, **new}, weights, self.restless, last=not comes_and_goes)
            if not may and isinstance(self.method, Alternating):
                other = self.method.instead(new, weights)
                if other is not None:
                    new = other
                    self._say_instead()
                may = self.wiring.allows(self.masks, {**self.masks, **new}, weights, self.restless)
            new = new if may else {name: self.masks[name] for name in new}
        if not self.restless and ranks.world() > 1:
            new = ranks.broadcast(new, next(iter(self.weights.values())).device)
        if not self.restless and (ranks.rank() or self.wiring.known is None):
            self.wiring.moved({**self.masks, **new})
        return new

    def _say_instead(self) -> None:
        if not self._said:
            say(
                f"mask {self.method.kind}: of the largest weights of all layers too few lie on a path, and a phase has "
                f"the largest of each layer in their place; set allocation: erk for it from the start, or a lower sparsity",
                logging.WARNING,
            )
        self._said = True

    def _looked_at(self) -> Mapping[str, Tensor]:
        """What the method is shown as the weights."""
        return self.weights

    def _say_frozen(self, frozen: list[str]) -> None:
        if frozen and frozen != self.frozen:
            say(
                f"mask {self.method.kind}: {len(frozen)} layers do not train when it moves, and their masks stay: "
                f"{some(frozen, 3)}"
            )
        self.frozen = frozen

    @torch.no_grad()
    def _reveal(self) -> None:
        """Give the optimizer all weights to work on."""
        checks.concealed(self.method, self._revealed)
        if any(param.grad is not None and param.grad.requires_grad for param in self.weights.values()):
            raise TostError(
                f"mask {self.method.kind}: expected gradients alone, got some with a graph (create_graph=True), along which "
                f"second-order optimizers go back once all weights are in the network; use another mask or optimizer"
            )
        if self.part is None:
            torch._foreach_add_(list(self.weights.values()), list(self._hidden().values()))
        else:
            self.part.reveal(self._hidden())
        self._revealed = True

    @torch.no_grad()
    def _reveal_all(self) -> None:
        """Before the mask moves: those too that do not train."""
        if self.part is not None and not self._all:
            self.conceal()
            torch._foreach_add_(list(self.weights.values()), list(self._hidden().values()))
            self._revealed = self._all = True

    @torch.no_grad()
    def _share(self) -> None:
        """Give every rank rank 0's hidden weights: what DDP sends when it wraps a model are those in the network."""
        hidden = self._hidden()
        for name, value in ranks.broadcast(hidden, next(iter(self.weights.values())).device).items():
            hidden[name].copy_(value)
        if self.part is not None:
            self.part.share()

    def _hidden(self) -> dict[str, Tensor]:
        """Name -> the weight where it is removed, 0 elsewhere; empty if the method hides none."""
        return buffers.of(self.owners, buffers.HIDDEN)
