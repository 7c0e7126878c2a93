"""How sharp the loss is where a network stands: the top eigenvalues of its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.training.batches import size_of
from tost_plugins.training.functions import backward_only
from tost_plugins.training.optional import package
from tost_plugins.training.params import unwrap
from tost_plugins.training.task import Task, untouched


def top_eigenvalues(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    mask: Mapping[str, Tensor] | None = None,
    count: int = 1,
    tolerance: float = 1e-3,
) -> list[float]:
    """The `count` largest eigenvalues (algebraically, the largest first) of the loss Hessian over the prunable weights.

    The loss is `loss_fn(logits, labels)` (cross entropy without), the mean over these batches, in eval mode, so that it
    is one fixed function. With a `mask` the Hessian is that of the subspace of the kept weights, the one in which a
    sparse network trains; without it all prunable weights may move. `tolerance` is the relative accuracy asked of
    eigsh. Products with the Hessian are two backward passes, which every layer of torch has (forward-mode derivatives,
    as curvlinops takes them, fail on SiLU). The model is left as it was.

    Raises TostError without scipy (`tost_plugins[studies]`), and where there are fewer than count + 2 weights.

    Paper: Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML 2022, figure 2.
    Differs from the paper: its text does not say on which data or in which space; here both are arguments.
    """
    return _top(Task.of(unwrap(model), batches=batches, loss_fn=loss_fn), mask, count, tolerance)


def _top(task: Task, mask: Mapping[str, Tensor] | None, count: int, tolerance: float) -> list[float]:
    sparse = package("scipy.sparse.linalg", "curvature", "tost_plugins[studies]")
    kept = torch.cat([_whole(name, weight, mask).flatten() for name, weight in task.params.items()])
    size = int(kept.sum())
    if size < count + 2:
        raise TostError(f"curvature: expected at least {count + 2} weights, got {size}; ask for fewer eigenvalues")
    with untouched(task.model, task.batches, train=False):
        every = list(task.batches or ())
        inside = sparse.LinearOperator((size, size), matvec=lambda v: _product(task, every, kept, v), dtype="float32")
        start = np.random.default_rng(0).standard_normal(size).astype("float32")
        found = sparse.eigsh(inside, k=count, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)
    return sorted((float(value) for value in found), reverse=True)


def _whole(name: str, weight: Tensor, mask: Mapping[str, Tensor] | None) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask[name].to(weight.device)


def _product(task: Task, batches: Sequence[Any], kept: Tensor, vector: Any) -> Any:
    """The Hessian within the kept weights times a vector, averaged over the batches by their number of labels."""
    direction = torch.zeros(len(kept), device=kept.device)
    direction[kept] = torch.as_tensor(np.asarray(vector).reshape(-1), dtype=torch.float32, device=kept.device)
    total, samples = torch.zeros_like(direction), 0
    for batch in batches:
        weights = task.weights(torch.float32)
        leaves, size = list(task.leaves(weights).values()), size_of(batch)
        loss = task.loss_at(weights, batch)
        with backward_only("curvature"):
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            slope = torch.cat([gradient.flatten() for gradient in gradients]) @ direction
            seconds = torch.autograd.grad(slope, leaves, materialize_grads=True)
        total += size * torch.cat([second.flatten() for second in seconds])
        samples += size
    return (total / samples)[kept].cpu().numpy()


def curvature(task: Task, mask: Mapping[str, Tensor], count: int = 1, tolerance: float = 1e-2) -> list[dict[str, Any]]:
    """Rows (`space`, `rank`, `eigenvalue`) for a running network: the top eigenvalues over the kept weights and over all.

    As `top_eigenvalues`, on the task's own batches, forward pass and loss.
    """
    rows = []
    for space, within in (("kept weights", mask), ("all weights", None)):
        values = _top(task, within, count, tolerance)
        rows += [{"space": space, "rank": rank, "eigenvalue": value} for rank, value in enumerate(values, start=1)]
    return rows
