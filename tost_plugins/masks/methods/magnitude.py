"""A mask from the weights' magnitudes: the large ones stay."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from tost_plugins.masks.base import STRICT, Allocation, Budget, OnCollapse, Sparsity
from tost_plugins.masks.budget import chosen
from tost_plugins.masks.mask import Mask
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Magnitude:
    """Keep the weights with the largest |w|; needs no data, and means most on a trained network.

    Fields: `sparsity` in [0, 1), 0 is dense; `allocation`, how the kept weights are shared out, "global"
    compares all layers; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer that loses
    everything; `budget`, whether
    the sparsity counts what is "kept" or what is "live", on a path (docs/masks.md).

    Paper: Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015.
    Differs from the paper: the number of weights is given, not a threshold per layer.

    Example:
        >>> net = torch.nn.Linear(4, 1, bias=False)
        >>> net.weight.data = torch.tensor([[0.1, -3.0, 0.2, 2.0]])
        >>> Magnitude(sparsity=0.5).start(Task.of(net), torch.Generator())["weight"].tolist()
        [[False, True, False, True]]
    """

    kind: Literal["magnitude"] = "magnitude"
    sparsity: Sparsity
    allocation: Allocation = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    budget: Budget = "kept"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError on weights that are not finite."""
        scores = {name: param.detach().abs() for name, param in task.params.items()}
        return chosen(scores, self, task)
