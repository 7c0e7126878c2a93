"""A mask from SNIP: the weights stay whose removal would change the loss most."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, Budget, OnCollapse, Sparsity
from tost_plugins.masks.budget import chosen
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import gradient, weights_to_score, wide
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task, untouched


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Snip:
    """Keep the weights with the largest |g * w|, g the gradient of the loss, summed over some batches.

    Fields: `sparsity` in [0, 1), 0 is dense; `batches`, how many batches to look at, 1 or more, fewer where
    the loader ends; `allocation`, "global" compares all layers; `ignore`, globs of layers to leave alone;
    `on_collapse`, for a layer that loses everything; `budget`, whether
    the sparsity counts what is "kept" or what is "live", on a path
    (docs/masks.md). The network runs in train mode. Across ranks the
    gradient of each batch is averaged before its magnitude is taken: 2 ranks with half of a batch each find
    the mask of 1 rank with the whole.

    Paper: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019.
    Differs from the paper: may look at several batches; the scores are not normalised, which changes no
    mask; a norm that starts at 0 counts as 1.

    Example:
        >>> net = torch.nn.Linear(8, 4)
        >>> batches = [(torch.rand(16, 8), torch.randint(4, (16,)))]
        >>> Snip(sparsity=0.75).start(Task.of(net, batches=batches), torch.Generator()).kept
        8
    """

    kind: Literal["snip"] = "snip"
    sparsity: Sparsity
    allocation: Allocation = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    budget: Budget = "kept"
    batches: Annotated[int, Field(ge=1, le=100_000), NUMBER] = 1

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError without batches, on a loss or gradient that is not finite, on a weight
        that the loss does not depend on."""
        return chosen(self.scores(task), self, task)

    def scores(self, task: Task) -> dict[str, Tensor]:
        """|g * w| summed over the batches, name -> tensor in the weight's shape, at least float32."""
        with untouched(task.model, task.batches, train=True):
            batches, weights = task.take(self.batches, "snip"), weights_to_score(task, "snip")
            own = {name: wide(weight.detach()) for name, weight in task.leaves(weights).items()}
            total = {name: torch.zeros_like(weight, dtype=weight.real.dtype) for name, weight in own.items()}
            for turn in range(self.batches):
                grads = gradient(task, batches[turn : turn + 1], weights, "snip")
                if not grads:
                    break
                for name, grad in grads.items():
                    total[name] += (grad * own[name]).abs()
        return total
