"""What is said when a run goes on from a checkpoint: what it takes from there, and what of its own it does not use."""

from __future__ import annotations

from tost_plugins.masks.base import MaskMethod, Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.training.clock import Clock


def line(method: MaskMethod, saved: Clock, asked: Clock, mask: Mask) -> tuple[str, bool]:
    """The line, and whether the checkpoint stands above something that the run asked for, which deserves a warning.

    `saved` and `mask` are the checkpoint's clock and mask; `asked` is the clock that the run would have started with.

    Example:
        >>> import torch
        >>> from tost_plugins.masks import MASKS
        >>> half = Mask({"fc.weight": torch.tensor([1, 0])})
        >>> line(MASKS["random"](sparsity=0.9), Clock(4, 4), Clock(0, 100), half)[0]
        'goes on from a checkpoint: step 4 of 4, a mask of sparsity 0.5000; not used: sparsity 0.9, total_steps 100'
    """
    unused = []
    sparsity = getattr(method, "sparsity", None)
    own = sparsity is not None and not isinstance(method, Moving)
    if own and abs(mask.sparsity - sparsity) > 1 / max(mask.size, 1):
        unused.append(f"sparsity {sparsity:g}")
    for key in ("total_steps", "steps_per_epoch"):
        before, now = getattr(saved, key), getattr(asked, key)
        if before is not None and now is not None and before != now:
            unused.append(f"{key} {now}")
    length = "" if saved.total_steps is None else f" of {saved.total_steps}"
    text = f"goes on from a checkpoint: step {saved.step}{length}, a mask of sparsity {mask.sparsity:.4f}"
    return text + (f"; not used: {', '.join(unused)}" if unused else ""), bool(unused)
