"""What the numbers of a rescaled initialisation minimise, on one batch and the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training import ranks
from tost_plugins.training.batches import joined, pick, size_of
from tost_plugins.training.functions import SMOOTHER, Instead
from tost_plugins.training.task import Task


class Look(NamedTuple):
    """One iteration: the loss, the gradient's norm, the loss one step ahead (None if it did not look)."""

    loss: float
    norm: float
    ahead: float | None


class Objective(NamedTuple):
    """What the scales minimise: the gradient's norm if it is above `norm`, else the loss one step ahead."""

    task: Task
    kept: Mapping[str, Tensor]
    look_ahead: float
    norm: float

    def gradient(self, theta: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """The masked gradient of the loss on this rank's batch, and the loss."""
        loss_of = grad_and_value(lambda theta: self.task.loss_at(theta, batch))
        with Instead(SMOOTHER):
            grads, loss = loss_of(theta)
        return {name: masked(grad, self.kept.get(name)) for name, grad in grads.items()}, loss

    def by_theta(self, theta: dict[str, Tensor], batch: Any, following: Any) -> tuple[dict[str, Tensor], Look]:
        """The derivative by the rescaled weights (to be averaged over the ranks), and what was seen."""
        # `pull(u)` is the derivative of <gradient, u>: one call of it serves either objective.
        seen: Any = vjp(lambda theta: self.gradient(theta, batch), theta, has_aux=True)
        local, pull, loss = seen
        grads, loss = _mean(local, loss)
        length = float(ranks.mean({"": _norm(grads)})[""].detach())  # by way of the ranks: all must decide alike
        _check_finite("loss and gradient norm", loss, length)
        if length > self.norm:
            (slopes,) = pull({name: grad / length for name, grad in grads.items()})
            return slopes, Look(loss, length, None)
        moved = {name: value - self.look_ahead * grads[name] for name, value in theta.items()}
        after, ahead = _mean(*self.gradient(moved, _halves(batch, following)))
        _check_finite("loss after the look-ahead step", ahead)
        (through,) = pull({name: -self.look_ahead * slope for name, slope in after.items()})
        return {name: after[name] + slope for name, slope in through.items()}, Look(loss, length, ahead)

    def by_scale(
        self, weights: Mapping[str, Tensor], scales: Tensor, batch: Any, following: Any
    ) -> tuple[Tensor, Look]:
        """The derivative by each scale, the same on every rank, and what was seen."""
        theta = {name: w * s.to(w.dtype) for (name, w), s in zip(weights.items(), scales, strict=True)}
        found, look = self.by_theta(theta, batch, following)
        slopes = torch.stack([(found[name] * weight).sum().float() for name, weight in weights.items()])
        slopes = ranks.mean({"": slopes})[""].detach()
        size = slopes.abs()
        _check_finite("slope for each scale", float(size.sum()))
        # A bias in front of a norm has no effect but rounding noise, which Adam would blow up to full steps.
        return slopes.masked_fill(size < 1e-6 * size.max(), 0), look


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Within: errors say where they came up, and that of a missing derivative what to do."""
    try:
        yield
    except (TostError, RuntimeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if any(words in reason for words in ("derivative for", "functorch", "torch.func")):
            text = f"{where}: expected a network that can be differentiated twice, got one that cannot ({reason})"
            raise Inapplicable(f"{text}; leave rescaled_init out") from error
        if "Cannot access data pointer" in reason:
            raise Inapplicable(
                f"{where}: expected layers whose gradient torch.func can follow, got some that it cannot, as recurrent layers on "
                f"packed sequences are ({reason}); give them padded tensors, or leave rescaled_init out"
            ) from error
        if "mutate a captured Tensor" in reason:
            raise Inapplicable(
                f"{where}: expected a loss that changes no tensor in place, got one that does, as a network beside this one does "
                f"whose norms are in training mode; call eval() on that one, or leave rescaled_init out"
            ) from error
        if isinstance(error, TostError):
            raise error.at(where) from None
        raise


def masked(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The tensor with 0 where `keep` is 0; as it is without a mask."""
    return tensor if keep is None else tensor * keep


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(tensor).float() for tensor in tensors.values()]).norm()


def _mean(grads: dict[str, Tensor], loss: Tensor) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss averaged over the ranks."""
    shared = ranks.mean({**grads, "": loss})
    return {name: shared[name] for name in grads}, float(shared[""].detach())


def _check_finite(what: str, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        shown = " and ".join(f"{value:g}" for value in values)
        remedy = "check the data and the weights, or lower look_ahead and learning_rate"
        raise TostError(f"expected a finite {what}, got {shown}; {remedy}")


def _halves(first: Any, second: Any) -> Any:
    """The first half of one batch and the second half of another; what is not per sample is the first's."""
    half, whole = size_of(first) // 2, size_of(second)
    return joined([pick(first, range(half)), pick(second, range(whole // 2, whole))]) if half else second
