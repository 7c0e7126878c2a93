"""What scoring methods share: gradients of the prunable weights over samples and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.training import ranks
from tost_plugins.training.batches import size_of
from tost_plugins.training.functions import backward_only
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name, plain_modules, some
from tost_plugins.training.task import Task

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it has fewer bits than that; itself in float32 and float64."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def weights_to_score(task: Task, method: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`Task.weights`, copies, in which a norm's gamma that is 0 throughout counts as 1, which is said.

    Many libraries start the last norm of a residual branch at 0. Behind such a norm every weight's score would be 0, and
    the order of the layers would decide which ones stay.
    """
    weights = task.weights(dtype)
    names = {id(param): clean_name(name) for name, param in task.model.named_parameters()}
    gammas = [(names[id(module.weight)], module.weight) for _, module in plain_modules(task.model)
              if isinstance(module, NORMS) and module.weight is not None]  # fmt: skip
    zero = [name for name, gamma in gammas if gamma.numel() and not bool(gamma.detach().any())]
    with torch.no_grad():
        for name in zero:
            weights[name].fill_(1)
    if zero:
        say(f"{method}: {len(zero)} norms start at 0 and count as 1 while weights are scored: {some(zero, 3)}")
    return weights


def derivative(
    value: Any, weights: Mapping[str, Tensor], method: str, *, create_graph: bool = False
) -> dict[str, Tensor]:
    """d value / d weight for each of the weights, in their shapes.

    `create_graph` keeps what a second derivative needs. Raises TostError when `value` is not one number
    that depends on every weight, naming the weight that it does not depend on.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TostError(f"{method}: expected a loss that is one number, got {got}; let the loss function average")
    if not value.requires_grad:
        raise TostError(
            f"{method}: expected a loss that depends on the weights, got one without a gradient; "
            f"take torch.no_grad() and .detach() out of the forward pass and the loss"
        )
    with backward_only(method):
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    for name, grad in zip(weights, grads, strict=True):
        if grad is None:
            raise TostError(
                f"{method}: expected a loss that depends on every prunable weight, got none that depends on "
                f"{name}; add {name.removesuffix('.weight')!r} to `ignore`"
            )
    return dict(zip(weights, grads, strict=True))


def gradient(
    task: Task,
    batches: Sequence[Any],
    weights: Mapping[str, Tensor],
    method: str,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The gradient of `loss(outputs, batch)`, the task's own by default, with respect to the prunable
    weights.

    Averaged with its sign over the samples of all batches on all ranks, so that two ranks with half of a
    batch each get what one rank gets from the whole. Raises TostError on a loss or gradient that is NaN or
    infinite.
    """
    own = task.leaves(weights)

    def term(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value = task.loss_at(weights, batch, loss)
        return value, derivative(value, own, method)

    return average(batches, own, term, method)


def average(
    batches: Sequence[Any],
    weights: Mapping[str, Tensor],
    term: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
    method: str,
) -> dict[str, Tensor]:
    """The tensors of `term(batch) = (loss, tensors)` averaged over the samples of all batches on all ranks.

    A rank may have fewer batches than others, or none; where no rank has any, the result is empty. Raises
    TostError on a loss or tensor that is not finite: on every rank, since it looks at the averages.
    """
    total = {name: torch.zeros_like(wide(weight), requires_grad=False) for name, weight in weights.items()}
    first = next(iter(total.values()))
    loss, count = first.new_zeros(()), first.new_zeros(())
    for batch in batches:
        size = size_of(batch)
        value, tensors = term(batch)
        for name, tensor in tensors.items():
            total[name].add_(wide(tensor), alpha=size)
        loss, count = loss + size * value.detach().to(loss), count + size
    mean = ranks.mean({**total, "loss": loss, "samples": count})
    samples = mean.pop("samples")
    if not samples:
        return {}
    _check_finite({"the loss": mean.pop("loss"), **mean}, method)
    return {name: tensor / samples for name, tensor in mean.items()}


def _check_finite(tensors: Mapping[str, Tensor], method: str) -> None:
    parts = [tensor for tensor in tensors.values() if tensor.numel()]
    if all(bool(norm.isfinite()) for norm in torch._foreach_norm(parts)):  # many times as fast; it may overflow
        return
    for name, tensor in tensors.items():
        if tensor.numel() and not bool(torch.isfinite(tensor).all()):
            what = name if name == "the loss" else f"the gradient of {name}"
            raise TostError(
                f"{method}: expected finite numbers, got NaN or infinity in {what}; "
                f"check the batches, the weights and the loss function"
            )
