"""Gradients of removed weights are 0 as soon as they are there, so that a norm to clip is that of the sparse network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tost_plugins.session.optimizing import Masked


class Following:
    """Masks each gradient when a backward pass has added to it, but where `dense()`, until `end`.

    Autograd calls these hooks before DDP averages the gradients (the mean of masked ones is the masked mean), outside
    compiled graphs, and never in copies of the model: a parameter is copied without its hooks. Masking twice is once,
    so micro-batches need no care.
    """

    def __init__(self, masked: Sequence[Masked], dense: Callable[[], bool]) -> None:
        self.masked = masked
        self.clean: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # place -> a masked gradient, and its version then
        self.handles = [self._follow(place, param, dense) for place, (param, _) in enumerate(masked)]

    def _follow(self, place: int, param: nn.Parameter, dense: Callable[[], bool]) -> torch.utils.hooks.RemovableHandle:
        follower = weakref.ref(self)  # torch holds the hooks where Python's collector cannot see them

        def hook(_: Tensor) -> None:
            if (found := follower()) is not None and not dense():
                found._mask(place)

        frozen = not param.requires_grad
        param.requires_grad_()  # torch refuses the hook without, but keeps it for when the weight is trained
        handle = param.register_post_accumulate_grad_hook(hook)
        if frozen:
            param.requires_grad_(False)
        return handle

    def _mask(self, place: int) -> None:
        param, mask = self.masked[place]
        if param.grad is not None:
            param.grad.mul_(mask)
            self.clean[place] = weakref.ref(param.grad), param.grad._version

    @torch.no_grad()
    def mask(self) -> None:
        """Mask those that have come by another way, or were changed since they came."""
        for place, (param, _) in enumerate(self.masked):
            grad, (seen, version) = param.grad, self.clean.get(place, (lambda: None, -1))
            if grad is not None and (seen() is not grad or grad._version != version):
                self._mask(place)

    def end(self) -> None:
        """Let gradients be what they are."""
        for handle in self.handles:
            handle.remove()
