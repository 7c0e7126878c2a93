"""A mask from a file, in any of the formats that people keep masks in."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from tost_plugins.masks.base import STRICT, OnCollapse
from tost_plugins.masks.given import fitted
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import revive
from tost_plugins.training.log import say
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class File:
    """Read the mask from `path`: our own file, a state dict with `*_mask` entries, a dict of 0/1 tensors,
    or the zeros of a checkpoint (see `Mask.load`).

    Fields: `path`, of the file; `ignore`, globs of layers that need no mask; `on_collapse`, for a layer whose weights
    are all removed: an error, or the largest of its weights stays ("keep_one").

    Paper: any. Differs from the paper: nothing.

    Example:
        >>> import tempfile
        >>> net, path = torch.nn.Linear(4, 1), tempfile.mkdtemp() + "/mask.safetensors"
        >>> Mask({"weight": torch.tensor([[1, 0, 0, 1]])}).save(path)
        >>> File(path=path).start(Task.of(net), torch.Generator()).sparsity
        0.5
    """

    kind: Literal["file"] = "file"
    path: str
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError on an unreadable file, on a missing or misshapen layer, on zeros in a
        layer that is ignored or not of this network, and on a layer without weights."""
        mask = fitted(Mask.load(self.path), task.model, task.params)
        if mask.kept == mask.size:
            say(f"mask file {self.path}: it keeps every weight; is it a dense checkpoint?", logging.WARNING)
        return revive(mask, task.params, self.on_collapse)
