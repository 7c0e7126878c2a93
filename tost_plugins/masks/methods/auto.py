"""The default mask: the model's own zeros if it is sparse already, else SynFlow, or SNIP where SynFlow does not fit."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from tost_plugins.errors import Inapplicable
from tost_plugins.masks.base import STRICT, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.masks.methods.synflow import SynFlow
from tost_plugins.masks.topk import revive
from tost_plugins.training.log import say
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Auto:
    """The model's own zeros where over half of its prunable weights are exactly 0, else SynFlow.

    Where SynFlow does not fit the network (its inputs are tokens, say) and there are batches, it is SNIP.

    Fields: `sparsity`, that of the mask that is found, 0.9 if not given; when it is given the model's zeros are not looked
    at. `ignore`, globs of layers to leave alone; `on_collapse`, for layers that lose everything (SynFlow empties the 1x1
    shortcuts of many networks).
    Which of them it was is logged in one line.

    Paper: none. Differs from the paper: this choice is ours.

    Example:
        >>> Auto().sparsity is None
        True
    """

    kind: Literal["auto"] = "auto"
    sparsity: Sparsity | None = None
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The model's zeros, or SynFlow's mask, or SNIP's; raises TostError where these do."""
        own = Mask.from_zeros(task.params)
        if self.sparsity is None and own.sparsity > 0.5:
            say(f"mask auto: the model is sparse already ({own.sparsity:.4f}), so its own zeros are the mask")
            return revive(own, task.params, self.on_collapse)
        sparsity = 0.9 if self.sparsity is None else self.sparsity
        try:
            mask = SynFlow(sparsity=sparsity, on_collapse=self.on_collapse).start(task, generator)
        except Inapplicable as error:
            if task.batches is None:
                raise
            say(f"mask auto: SNIP at sparsity {sparsity:g}, since SynFlow does not fit: {error}")
            return Snip(sparsity=sparsity, on_collapse=self.on_collapse).start(task, generator)
        say(f"mask auto: SynFlow at sparsity {sparsity:g}")
        return mask
