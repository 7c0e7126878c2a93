"""Gradients of removed weights are 0 as soon as they are there, so that a norm to clip is that of the sparse network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tost_plugins.optimizing import Masked


def mask_as_they_come(masked: Sequence[Masked], dense: Callable[[], bool]) -> Callable[[], None]:
    """Mask each gradient when a backward pass has added to it, but where `dense()`; returns what ends that.

    Autograd calls these hooks before DDP averages the gradients (the mean of masked ones is the masked mean), outside
    compiled graphs, and never in copies of the model: a parameter is copied without its hooks. Masking twice is once,
    so micro-batches need no care.
    """
    handles = []
    for param, mask in masked:
        frozen = not param.requires_grad
        param.requires_grad_()  # torch refuses the hook without, but keeps it for when the weight is trained
        handles.append(param.register_post_accumulate_grad_hook(_hook(mask, dense)))
        if frozen:
            param.requires_grad_(False)

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _hook(mask: Tensor, dense: Callable[[], bool]) -> Callable[[Tensor], None]:
    def after(param: Tensor) -> None:
        if param.grad is not None and not dense():
            param.grad.mul_(mask)

    return after
