"""The start of a run: its mask found, checked and applied, its tweaks begun; after an error the weights are what they were."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tost_plugins import masks
from tost_plugins.errors import TostError
from tost_plugins.masks.base import MaskMethod, Moving, Scored
from tost_plugins.masks.given import fitted
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity
from tost_plugins.masks.topk import revive
from tost_plugins.session import buffers, resuming
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.compaction import Compaction
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.report import report
from tost_plugins.session.wiring import Wiring
from tost_plugins.training.calling import CRITERION
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.task import Task


def begin(
    task: Task,
    recipe: Any,
    given: Mask | None,
    tweaks: ActiveTweaks,
    clock: Clock,
    wiring: Wiring,
    compaction: Compaction,
) -> None:
    """Find the mask to train with, see that it connects, put it into the model's buffers, with the weights that some methods
    bring along, and apply it unless removed weights train out of sight."""
    method = recipe.mask
    with tweaks.quiet():
        tweaks.look(task)
    # without tweaks nothing can go wrong any more when the mask is found
    before = {param: param.detach().clone() for param in task.model.parameters()} if tweaks.active else {}
    with tweaks.quiet():
        found = _find(task, method, given, recipe.seed, wiring)
        mask = compaction.live(found)
        try:
            _put(masks.starting_weights(method, task, found, recipe.seed) if given is None else {}, task)
            if isinstance(method, Scored):
                method.prepare(task.params, mask)
            if tweaks.active and not _needs_all(method, clock):
                mask.apply_(task.params)  # else when the run takes the mask over
            tweaks.start(task, mask)
        except BaseException:
            with torch.no_grad():
                for param, value in before.items():
                    param.copy_(value)
            raise
    for which in (buffers.MASK, buffers.SEEN) if isinstance(method, Moving) else (buffers.MASK,):
        for name, buffer in buffers.beside(task.model, dict(task.params), which).items():
            buffer.copy_(mask[name])


@torch.no_grad()
def _put(weights: Mapping[str, torch.Tensor], task: Task) -> None:
    """Start with these weights in place of the network's own."""
    for name, weight in weights.items():
        task.params[name].copy_(weight)
    if weights:
        say(f"{len(weights)} layers start with weights that come with the mask")


def _needs_all(method: MaskMethod, clock: Clock) -> bool:
    """Whether the run, when it takes the mask over, is to find the removed weights too."""
    hides = isinstance(method, Moving) and method.hides and not method.settled(clock)
    return hides or isinstance(method, Scored)


def say_begun(
    recipe: Any, given: Mask | None, weights: MaskedWeights, tweaks: ActiveTweaks, found: Connectivity | None
) -> None:
    """The one line that says what a run starts with."""
    kinds = ", ".join(tweak.kind for tweak in tweaks) or "no tweaks"
    left = f"; left out: {', '.join(tweaks.left_out)}" if tweaks.left_out else ""
    source = "a given mask" if given is not None else recipe.mask.kind
    say(f"recipe {recipe.name}: {source}, {report(weights, tweaks, False, found)}; {kinds}{left}")


def say_looked(recipe: Any, tweaks: ActiveTweaks) -> None:
    """The one line where nobody has said which loss trains, and one was looked at."""
    kinds = " or ".join([recipe.mask.kind, *tweaks.looking])
    say(
        f"recipe {recipe.name}: the loss that {kinds} has looked at is cross entropy; where another one trains, {CRITERION}"
    )


def say_resumed(recipe: Any, given: Mask | None, saved: Clock | None, asked: Clock, mask: Mask, kind: str) -> None:
    """The one line that says what a run takes from a checkpoint; `kind` is that of the checkpoint's mask."""
    fixed = given is None and not isinstance(recipe.mask, Moving)
    sparsity = getattr(recipe.mask, "sparsity", None) if fixed else None
    other = recipe.mask.kind if fixed and recipe.mask.kind != kind else None
    text, differs = resuming.line(sparsity, saved or asked, asked, mask, other)
    say(f"recipe {recipe.name}: {text}", logging.WARNING if differs else logging.INFO)


def _given(mask: Mask, method: MaskMethod, model: nn.Module, params: Mapping[str, nn.Parameter]) -> Mask:
    """A given mask, cut to the network's layers and checked."""
    return revive(fitted(mask, model, params), params, getattr(method, "on_collapse", "error"))


def impose(model: nn.Module, method: MaskMethod, given: Mask | None, params: Mapping[str, nn.Parameter]) -> bool:
    """A given mask that does not move stands above a checkpoint's: a lottery ticket goes on from an early, denser state.
    True where it is another one."""
    if given is None or isinstance(method, Moving):
        return False
    mask, saved = _given(given, method, model, params), buffers.beside(model, dict(params))
    other = mask != (loaded := Mask(saved))
    if other:
        say(f"the given mask (sparsity {mask.sparsity:.4f}) replaces the checkpoint's ({loaded.sparsity:.4f})")
    for name, buffer in saved.items():
        buffer.copy_(mask[name])
    return other


def _find(task: Task, method: MaskMethod, given: Mask | None, seed: int, wiring: Wiring) -> Mask:
    if given is not None:
        mask, where = _given(given, method, task.model, task.params), "the given mask"
    else:
        where = f"mask {method.kind}"
        try:
            mask = masks.search(method, task, seed)
        except TostError as error:
            raise error.at(where) from None
    wiring.follow(task)
    wiring.take(mask, where)
    return mask
