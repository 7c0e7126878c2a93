"""A random mask: the structure of a sparse network without any knowledge of the network."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from tost_plugins.masks.base import STRICT, Budget, OnCollapse, Sparsity
from tost_plugins.masks.budget import chosen
from tost_plugins.masks.like import Shares, shares
from tost_plugins.masks.mask import Mask
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Random:
    """Keep weights drawn at random, an exact number of them; needs no data.

    Fields: `sparsity` in [0, 1), 0 is dense; `allocation`, how the kept weights are shared out, "global"
    draws from all layers at once, "like:snip" (or another method that finds a mask at once) gives each layer as many as that
    one would; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer that
    loses everything; `budget`, whether
    the sparsity counts what is "kept" or what is "live", on a path (docs/masks.md).

    Paper: Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    Differs from the paper: exact counts instead of Bernoulli draws.

    Example:
        >>> net = torch.nn.Linear(8, 4)
        >>> mask = Random(sparsity=0.75).start(Task.of(net), torch.Generator().manual_seed(0))
        >>> mask.kept
        8
    """

    kind: Literal["random"] = "random"
    sparsity: Sparsity
    allocation: Shares = "erk"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    budget: Budget = "kept"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask, drawn on the CPU; raises TostError where the method does whose shares are taken."""
        draws = {
            name: torch.rand(param.shape, generator=generator, dtype=torch.float64, device=generator.device)
            for name, param in task.params.items()
        }
        return chosen(draws, self, task, shares(self.allocation, self.sparsity, self.on_collapse, task, generator))
