"""The one owner of masked weights: their masks, and all that keeps weights and gradients in line with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import count_true
from tost_plugins.session import backward
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training import ranks
from tost_plugins.training.clock import Clock
from tost_plugins.training.sharding import is_part, like, local


class MaskedWeights:
    """Weights by name, each with its mask in its own dtype, layout and place, ready to multiply with.

    While `follow` holds, gradients of removed weights are 0 as they arrive, so that clipping, averaging and logging see
    the sparse network, and so what an optimizer keeps for such a weight stays what it gives a new one: it is left alone.
    `after_step` makes every removed weight exactly 0 (or what it has `instead`), whatever the optimizer did. A mask that
    moves is a `MovingWeights`.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        instead: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights = dict(weights)
        # laid out in memory as the weight is: multiplying two layouts takes many times as long
        self.kept = {
            name: torch.empty_like(param.detach()).copy_(like(mask[name].to(param.device), param))
            for name, param in weights.items()
        }
        # name -> what removed weights are in place of 0, itself 0 for the others
        self._instead = [] if instead is None else [instead[name].to(param) for name, param in weights.items()]
        self._count = sum(int(count_true(kept)) for kept in mask.values())
        self.about: Mapping[str, Any] = {}  # how it was found, for its card
        self.moved: dict[str, float] = {}
        self.made: dict[str, Any] = {}  # what tweaks have made of the mask; empty again when it moves
        self._mask: Mask | None = mask if isinstance(mask, Mask) else None  # None: made when somebody asks
        self._arrived: dict[str, tuple[weakref.ref[Tensor], int]] = {}  # gradients as they were when last masked
        self.had_gradients = False  # since they are followed
        self.frozen: list[str] = []  # layers that did not train when the mask last moved
        self.came: set[str] = set()  # weights for which a gradient has come since the last step
        self.passes, self._pass = 0, -1  # backward passes since the last step, and the last one's number
        self._looked_after = -1  # the backward pass whose end is waited for
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def mask(self) -> Mask:
        """What is kept now, on the CPU."""
        if self._mask is None:
            self._mask = Mask(self.kept).described(**self.about)
        return self._mask

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(param.numel() for param in self.weights.values())

    @property
    def count(self) -> int:
        """How many of them are kept."""
        return self._count

    @property
    def restless(self) -> bool:
        """Whether the mask moves at every step now."""
        return False

    def metrics(self) -> dict[str, float]:
        """What to log of a mask that moves, or has moved; nothing otherwise."""
        return self.moved

    @property
    def version(self) -> int:
        """Changes whenever somebody writes into the weights."""
        return sum(param._version for param in self.weights.values())

    def trains(self, name: str) -> bool:
        """Whether a weight trains now, or has had its turn in this step: a GAN's loop turns the other network's weights off."""
        return self.weights[name].requires_grad or name in self.came

    # ---- gradients

    def follow(self) -> None:
        """From now on no gradient of a removed weight is seen by anybody, but where a mask that moves is to see it.

        Autograd calls these hooks before DDP averages the gradients (the mean of masked ones is the masked mean), outside
        compiled graphs, and never in copies of the model: a parameter is copied without its hooks. Masking twice is once,
        so micro-batches need no care. What DDP's hooks make of gradients (PowerSGD) is masked when the pass is over.
        """
        self.release()
        self._handles = [self._hook(name, param) for name, param in self.weights.items()]

    def release(self) -> bool:
        """Let gradients be what they are; True if they were followed."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        return bool(handles)

    def _hook(self, name: str, param: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        owner = weakref.ref(self)  # torch holds the hooks where Python's collector cannot see them

        def hook(_: Tensor) -> None:
            if (found := owner()) is not None:
                found.had_gradients = True
                found.comes(name)
                if found._pass != (number := backward.number()):
                    found._pass, found.passes = number, found.passes + 1
                if not found.wants_dense():
                    found._arrives(name)
                    found._look_again(param)

        frozen = not param.requires_grad
        param.requires_grad_()  # torch refuses the hook without, but keeps it for when the weight is trained
        handle = param.register_post_accumulate_grad_hook(hook)
        if frozen:
            param.requires_grad_(False)
        return handle

    def comes(self, name: str) -> None:
        """A gradient has come for this weight, whatever becomes of it."""
        self.came.add(name)

    def _arrives(self, name: str) -> None:
        self._mask_gradient(name)

    def _mask_gradient(self, name: str) -> None:
        grad = self.weights[name].grad
        if grad is not None:
            grad.mul_(self.reached(name))
            self._arrived[name] = weakref.ref(grad), grad._version

    def _look_again(self, param: nn.Parameter) -> None:
        """When this backward pass is over and several ranks have made one gradient of theirs: once for all weights."""
        pass_ = backward.number()
        if pass_ != self._looked_after and ranks.world() > 1 and not is_part(param):
            self._looked_after = pass_
            backward.when_over(self._pass_is_over)

    def _pass_is_over(self) -> None:
        if self._handles and not self.wants_dense():
            self._mask_changed()

    @torch.no_grad()
    def _mask_changed(self) -> None:
        """Mask gradients that have come by another way than autograd's, or were changed since they came."""
        for name, param in self.weights.items():
            grad, (seen, version) = param.grad, self._arrived.get(name, (lambda: None, -1))
            if grad is not None and (seen() is not grad or grad._version != version):
                self._mask_gradient(name)

    def reached(self, name: str) -> Tensor:
        """Where gradients reach a weight: 1, and 0 elsewhere."""
        return self.kept[name]

    def wants_dense(self) -> bool:
        """Whether the gradients of the step at hand are to reach removed weights too."""
        return False

    def settle(self) -> None:
        """Tweaks have changed gradients that were masked, and are so still: what changes them from here on comes later."""
        if not self.wants_dense():
            grads = {name: param.grad for name, param in self.weights.items() if param.grad is not None}
            self._arrived |= {name: (weakref.ref(grad), grad._version) for name, grad in grads.items()}

    # ---- around a step

    def begin(self, clock: Clock, optimizers: Optimizers | None, fresh: bool) -> None:
        """At the start of a run (`fresh`), or where it goes on from a checkpoint."""
        self.zero()
        if fresh:
            self.forget(optimizers)

    def before_step(self, optimizers: Optimizers | None = None, check_finite: bool = True) -> None:
        """With final gradients: mask those that have come by another way, or were changed since they came."""
        self._mask_changed()

    def stepped(self, optimizers: Optimizers | None) -> None:
        """The optimizer has stepped, and nobody has changed weights since."""

    def after_step(self, clock: Clock, optimizers: Optimizers | None = None) -> None:
        """When a step is done: every removed weight is exactly 0."""
        self.zero()

    def forget(self, optimizers: Optimizers | None) -> None:
        """Removed weights have gone: optimizers remember nothing of them."""
        for name, weight in self.weights.items():
            if optimizers is not None and optimizers.remember(weight):
                removed = local(self.kept[name]) == 0
                optimizers.renew(weight, removed, torch.zeros_like(removed))

    def exchange(self, swap: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """While an optimizer puts other weights into the network: schedule-free ones train and evaluate with different ones."""
        result = swap(*args, **kwargs)
        self.zero()
        return result

    def conceal(self) -> None:
        """Take removed weights that train out of sight out of the network again, if there are any."""

    @torch.no_grad()
    def zero(self, diverged: bool = False) -> None:
        """Set removed weights to exactly 0; `diverged`: also those that are NaN or infinite, which a product leaves so."""
        if diverged:
            for name, kept in self.kept.items():
                self.weights[name].masked_fill_(kept == 0, 0)
        elif self.weights:
            torch._foreach_mul_([local(w) for w in self.weights.values()], [local(kept) for kept in self.kept.values()])
        if self._instead:
            torch._foreach_add_(list(self.weights.values()), self._instead)
