"""A mask from GraSP: the weights stay whose removal would harm the gradient's norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tost_plugins.errors import TostError
from tost_plugins.masks.balanced import balanced
from tost_plugins.masks.base import STRICT, Allocation, Budget, OnCollapse, Sparsity
from tost_plugins.masks.budget import chosen
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import average, derivative, gradient, weights_to_score, wide
from tost_plugins.training import ranks
from tost_plugins.training.batches import walk
from tost_plugins.training.calling import loss_of, main_of, own_loss
from tost_plugins.training.functions import SMOOTHER, Instead, backward_only
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task, untouched


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Grasp:
    """Keep the weights whose removal would reduce the norm of the gradient most (or increase it least).

    To first order, removing a weight changes |g|^2 by twice S = -w * Hg, with g the gradient and H the
    Hessian of the loss. The weights with the lowest S stay, those with the highest go.

    Fields: `sparsity` in [0, 1), 0 is dense; `per_class`, samples of each class to look at, taken as the
    batches give them (R ranks take ceil(per_class / R) each); `temperature` T, the loss sees logits / T, 1
    leaves them alone; `allocation`, "global" compares all layers; `ignore`, globs of layers to leave alone;
    `on_collapse`, for a layer that loses everything; `budget`, whether
    the sparsity counts what is "kept" or what is "live", on a path
    (docs/masks.md). The network runs in train mode, on as many samples at
    once as the loader has in a batch.

    Paper: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020.
    Differs from the paper: a norm that starts at 0 counts as 1.

    Example:
        >>> net = torch.nn.Linear(8, 4)
        >>> batches = [(torch.rand(64, 8), torch.arange(64) % 4)]
        >>> Grasp(sparsity=0.75).start(Task.of(net, batches=batches), torch.Generator()).kept
        8
    """

    kind: Literal["grasp"] = "grasp"
    sparsity: Sparsity
    allocation: Allocation = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    budget: Budget = "kept"
    per_class: Annotated[int, Field(ge=1, le=100_000), NUMBER] = 10
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 200.0

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError without batches with one class per sample, on a loss or gradient that
        is not finite, and on a weight that the loss does not depend on."""
        worth = {name: -harmless for name, harmless in self.scores(task).items()}
        return chosen(worth, self, task)

    def scores(self, task: Task) -> dict[str, Tensor]:
        """S = -w * Hg, name -> tensor in the weight's shape, at least float32; high where removal does no
        harm."""
        with untouched(task.model, task.batches, train=True), sdpa_kernel(SDPBackend.MATH), Instead(SMOOTHER):
            batches, weights = balanced(task, self.per_class), weights_to_score(task, "grasp")
            one = len(batches) == 1 and ranks.world() == 1  # its gradient, which is differentiated, is the whole one
            grads = {} if one else gradient(task, batches, weights, "grasp", partial(self._loss, task))
            product = self._hessian_times(task, batches, weights, grads)
            return {name: -wide(w.detach()) * product[name] for name, w in task.leaves(weights).items()}

    def _hessian_times(
        self, task: Task, batches: Sequence[Any], weights: Mapping[str, Tensor], vector: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """H times the vector (without one: the gradient itself), averaged over samples and ranks: the gradient of
        (gradient . vector)."""
        own = task.leaves(weights)

        def term(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss = task.loss_at(weights, batch, partial(self._loss, task))
            grads = derivative(loss, own, "grasp", create_graph=True)
            dot = torch.stack(
                [(wide(grad) * vector.get(name, wide(grad.detach()))).sum() for name, grad in grads.items()]
            ).sum()
            return loss, _second_derivative(dot, own)

        return average(batches, own, term, "grasp")

    def _loss(self, task: Task, outputs: Any, batch: Any) -> Tensor:
        """The task's loss of outputs / T; for outputs with `logits` the loss of those, by default cross entropy."""

        def cool(part: Any) -> Any:
            return part / self.temperature if isinstance(part, Tensor) and part.is_floating_point() else part

        if isinstance(outputs, Tensor) or own_loss(outputs) is None:
            return task.loss(_within(cool, outputs), batch)
        return loss_of(cool(main_of(outputs)), batch, task.model, task.loss_fn)  # its own loss is that of hot ones


def _within(change: Callable[[Any], Any], outputs: Any) -> Any:
    """Outputs of the same kind with `change(part)` for the tensors in them: containers', or an object's attributes."""
    own = is_dataclass(outputs)  # those of transformers are dicts as well, which their attributes write
    if isinstance(outputs, Tensor) or (isinstance(outputs, (Mapping, tuple, list)) and not own):
        return walk(change, outputs)
    changed, put = copy.copy(outputs), setattr if isinstance(outputs, Mapping) else object.__setattr__
    for name in [field.name for field in fields(outputs)] if own else [*getattr(outputs, "__dict__", ())]:
        put(changed, name, walk(change, getattr(outputs, name)))
    return changed


def _second_derivative(value: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d value / d weight of a value made of gradients; 0 where it depends on no weight, as for a linear loss."""
    if not value.requires_grad:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        with backward_only("grasp"):
            grads = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TostError(
            f"grasp: expected a network that can be differentiated twice, got {error}; "
            f"use another activation or mask method"
        ) from None
    return dict(zip(weights, grads, strict=True))
