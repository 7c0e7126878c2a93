"""Whether a mask connects the inputs with the outputs: looked at once when it is found, given or loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity, Paths, refusal
from tost_plugins.masks.topk import empty
from tost_plugins.training.log import say
from tost_plugins.training.params import some
from tost_plugins.training.task import Task


def followed(task: Task) -> Paths | None:
    """The paths of a task's network; None, and one line, where it cannot be followed."""
    try:
        return Paths(task)
    except TostError as error:
        say(f"mask: what it connects is not known ({error})")
        return None


def check(mask: Mapping[str, Tensor], paths: Paths | None, loaded: bool = False) -> Connectivity | None:
    """What the mask connects, None where that is not known.

    Raises TostError where no path leads from the inputs to the outputs; where the network could not be followed, on a layer
    without any weight, unless the mask is `loaded`: it has been looked at before. Such layers beside others are said in one
    line.
    """
    found = connects(mask, paths)
    if found is not None and not found.connected:
        raise refusal(found)
    lost = empty(mask)
    if lost and found is None and not loaded:
        raise TostError(
            f"expected at least one weight in every layer, got none in {some(lost, 20)}, and what the others connect is not "
            f"known; pass batches that the network runs on, set a lower sparsity, allocation: erk, or on_collapse: keep_one"
        )
    tell_empty(lost if found is not None else [])
    return found


def connects(mask: Mapping[str, Tensor], paths: Paths | None) -> Connectivity | None:
    """What the mask connects; None where that is not known, for one because no path shows in the dense network either."""
    if paths is None:
        return None
    found = paths.connectivity(mask)
    if not found.connected and not paths.connectivity(Mask.dense(mask)).connected:
        say("mask: what it connects is not known (no path from the inputs to the outputs of the dense network is seen)")
        return None
    return found


def tell_empty(names: list[str]) -> None:
    """The line that layers have no weights and are not missed; nothing without such layers."""
    if names:
        text = f"mask: {len(names)} layers keep no weight, others beside them connect: {some(names, 20)}"
        say(f"{text}; name those in `ignore` that are to stay dense", logging.INFO)
