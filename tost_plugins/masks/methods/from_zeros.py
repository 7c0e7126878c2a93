"""The mask of a network that is sparse already: the zeros of its weights."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from tost_plugins.errors import TostError
from tost_plugins.masks.base import STRICT, OnCollapse
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import revive
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FromZeros:
    """Remove exactly the weights that are 0 now, by whatever means they became so.

    Fields: `ignore`, globs of layers to leave alone; `on_collapse`, for a layer whose weights are all 0: an
    error, or its first weight stays ("keep_one").

    Paper: any. Differs from the paper: nothing.

    Example:
        >>> net = torch.nn.Linear(4, 1)
        >>> net.weight.data = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> FromZeros().start(Task.of(net), torch.Generator()).sparsity
        0.5
    """

    kind: Literal["from_zeros"] = "from_zeros"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError when no weight is 0, and when a layer's weights all are."""
        mask = Mask.from_zeros(task.params)
        if mask.kept == mask.size:
            raise TostError(
                "expected a model with zeros in its prunable weights, got none; load the sparse weights "
                "first, or choose a mask method such as synflow"
            )
        return revive(mask, task.params, self.on_collapse)
