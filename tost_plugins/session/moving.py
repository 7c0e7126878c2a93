"""What a session does when its mask moves: new masks into the buffers, and weights that train out of sight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import count_true
from tost_plugins.session import buffers, optimizing
from tost_plugins.training import ranks, seeds, sharding
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import owners, some


class Movement:
    """The mask of a running session, as its method moves it; all that a checkpoint needs is in the model's buffers.

    `kept` has the mask in each weight's own dtype and on its device, and is changed in place.
    """

    def __init__(
        self, method: Moving, seed: int, model: nn.Module, weights: dict[str, nn.Parameter], kept: dict[str, Tensor]
    ) -> None:
        self.method, self.seed, self.model, self.weights, self.kept = method, seed, model, weights, kept
        self.masks, self.seen = (buffers.beside(model, weights, which) for which in (buffers.MASK, buffers.SEEN))
        # looked up by owner: a model that changes its dtype puts other buffers in the hidden weights' place
        self.owners = owners(model, weights) if method.hides else {}
        self.changed: Tensor = getattr(model, buffers.CHANGED)
        self._frozen: list[str] = []  # layers that did not train when the mask last moved
        self._mask: Mask | None = None  # None: it has moved since somebody looked
        self._metrics: dict[str, float] | None = None  # as above
        self._moved_at = -1  # the step at whose gradients the mask has moved: a closure may come by twice
        self.moved = True  # whether weights may be outside the mask: set by a move, cleared by who has dealt with it
        self._revealed = False  # whether hidden weights are in the network, between gradients and step

    @property
    def mask(self) -> Mask:
        """What it is now."""
        if self._mask is None:
            self._mask = Mask(self.masks)
        return self._mask

    def begin(self, clock: Clock) -> None:
        """With all weights in the network: the state before a run's first step, the same on every rank."""
        self._revealed = self.hides(clock)
        self.after(clock)
        self._share()

    def hides(self, clock: Clock) -> bool:
        """Whether removed weights train out of sight now."""
        return self.method.hides and not self.method.settled(clock)

    def wants_dense(self, clock: Clock) -> bool:
        """Whether the gradients of the step at hand are to reach removed weights: they train, or are to be compared."""
        return self.hides(clock) or (self.method.takes_step and self.method.due(clock))

    def before(self, clock: Clock, optimizer: Optimizer | None, check_finite: bool) -> bool:
        """With final gradients: True if they are not to be masked, since they must reach the removed weights too or
        have been used up. `check_finite=False`: they may hold NaN or Inf, and a loss scaler skips the step then."""
        if self.hides(clock):
            self._reveal()
            return True
        if optimizer is None or not self.wants_dense(clock):
            return False
        if not check_finite and optimizing.not_finite(self.model, optimizer):
            return False  # the scaler skips this step, and the mask with it
        if self._moved_at != clock.step:
            # what grows starts at 0, whatever others have put there
            optimizing.mask_weights([(self.weights[name], kept) for name, kept in self.kept.items()], optimizer)
            self._move({n: param.grad for n, param in self.weights.items() if param.grad is not None}, clock)
            self._moved_at = clock.step
        optimizing.drop_gradients(optimizer)
        return True

    def after(self, clock: Clock) -> None:
        """When a step is done: move a mask that follows the weights, and hide what it removes."""
        if not self.method.takes_step and self.method.due(clock):
            self._move({}, clock)
        self.conceal(clock)

    @torch.no_grad()
    def conceal(self, clock: Clock) -> None:
        """Take removed weights out of the network and remember them, if they are in it."""
        if self._revealed and self.hides(clock):
            for name, hidden in self._hidden().items():
                weight = self.weights[name]
                hidden.copy_(weight)
                hidden.sub_(weight.mul_(self.kept[name]))  # filling in by a mask takes several times as long
        self._revealed = False

    def metrics(self) -> dict[str, float]:
        """How many entries the last move has changed, and the share of the weights that have ever been kept."""
        if self._metrics is None:
            seen = torch.stack([count_true(seen) for seen in self.seen.values()]).sum()
            explored = int(seen) / sum(seen.numel() for seen in self.seen.values())
            self._metrics = {"tost/mask/changed": float(self.changed), "tost/mask/explored": explored}
        return self._metrics

    # ---- inside

    @torch.no_grad()
    def _move(self, grads: Mapping[str, Tensor], clock: Clock) -> None:
        """Put the method's next mask into the buffers.

        Randomness comes from the seed and the step alone. Every rank gets rank 0's mask, except after each step of a
        method that hides weights: there it follows from weights that are equal on all ranks.
        """
        weights, grads = ({n: sharding.whole(t) for n, t in tensors.items()} for tensors in (self.weights, grads))
        moving = {name: mask for name, mask in self.masks.items() if self.weights[name].requires_grad}
        self._say_frozen([name for name in self.masks if name not in moving])
        new = (
            self.method.update(moving, weights, grads, clock, seeds.generator(self.seed, clock.step)) if moving else {}
        )
        if not self.hides(clock):
            new = ranks.broadcast(new, self._device)
        self.changed.fill_(sum(count_true(mask ^ self.masks[name]) for name, mask in new.items()))
        for name, mask in new.items():
            self.masks[name].copy_(mask)
            self.kept[name].copy_(sharding.like(mask, self.kept[name]))
            self.seen[name].logical_or_(mask)
        self._mask = self._metrics = None
        self.moved = True

    def _say_frozen(self, frozen: list[str]) -> None:
        if frozen != self._frozen and frozen:
            say(
                f"mask {self.method.kind}: {len(frozen)} layers do not train any more, and their masks stay: {some(frozen, 3)}"
            )
        self._frozen = frozen

    @torch.no_grad()
    def _reveal(self) -> None:
        """Give the optimizer all weights to work on."""
        if self._revealed:
            raise TostError(
                f"mask {self.method.kind}: expected one gradient for each step, got a second one while all weights "
                f"are in the network (SAM and LBFGS take several); use another optimizer, or a mask that does not hide"
            )
        hidden = list(self._hidden().values())
        torch._foreach_add_(list(self.weights.values()), hidden)
        torch._foreach_zero_(hidden)
        self._revealed = True

    @torch.no_grad()
    def _share(self) -> None:
        """Give every rank rank 0's hidden weights: what DDP sends when it wraps a model are those in the network."""
        hidden = self._hidden()
        for name, value in ranks.broadcast(hidden, self._device).items():
            hidden[name].copy_(value)

    def _hidden(self) -> dict[str, Tensor]:
        """Name -> the weight where it is removed, 0 elsewhere; empty if the method hides none."""
        return {name: getattr(module, buffers.HIDDEN) for name, module in self.owners.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device
