"""What a session looks at before it trusts a model: structure, places of weights, times, and what the end is like."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.masks.base import MaskMethod, Moving, Scored
from tost_plugins.session import buffers
from tost_plugins.session.link import session_of
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training import sharding
from tost_plugins.training.clock import Clock, times_of
from tost_plugins.training.finite import not_finite
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name, layer_of, some, unwrap
from tost_plugins.tweaks import Tweak


def bare(model: nn.Module) -> None:
    """Raise TostError unless the model can be attached to: a network, not wrapped, not in parts, without a session."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TostError(f"attach: expected a torch.nn.Module, got {got}; pass the network itself")
    if unwrap(model) is not model:
        raise TostError(
            f"attach: expected the bare model, got it inside {type(model).__name__}; attach first, then wrap or compile"
        )
    sharding.check_bare("attach", model)
    if session_of(model) is not None:  # a copy, whose session is another model's, is taken over as it is
        raise TostError(
            "attach: expected a model without a session, got one that is attached already; "
            "use that session, or finish() it first"
        )


def in_whole(weights: Mapping[str, nn.Parameter], method: MaskMethod, watch: Any) -> None:
    """Raise TostError where weights are kept in parts that the recipe's mask or watch cannot work with."""
    if not any(map(sharding.is_part, weights.values())):
        return
    if isinstance(method, Moving) and (method.hides or isinstance(method, Scored)):
        raise TostError(
            f"mask {method.kind}: expected whole weights on every rank, got FSDP2's parts, of which no rank can "
            f"tell the largest; use DDP, or a mask that moves now and then (rigl, set, gradual)"
        )
    if watch is not None:
        raise TostError(
            "watch: expected whole weights on every rank, got FSDP2's parts; use DDP, or leave watch out of the recipe"
        )


def still_ours(model: nn.Module, added: Iterable[str], tweaks: Iterable[Tweak]) -> None:
    """Modules that others put in the place of ours would train without masks, ghosts and soft activations: raise TostError
    where one of the buffers `added` at attach is gone."""
    here = {clean_name(name): buffer for name, buffer in model.named_buffers(remove_duplicate=False)}
    lost = {name.replace(".ghost_skip.", ".").rpartition(".")[0] for name in added if clean_name(name) not in here}
    params = {clean_name(name): param.shape for name, param in model.named_parameters(remove_duplicate=False)}
    for name in filter(buffers.is_mask, map(clean_name, set(added) - lost)):
        weight = name.removesuffix(buffers.MASK)
        if name in here and params.get(weight, here[name].shape) != here[name].shape:
            lost.add(layer_of(weight))
    if lost:
        raise TostError(
            f"start: expected the modules that were there at attach, got others at {some(sorted(lost))}; "
            f"replace modules before attach"
        )
    for tweak in tweaks:
        tweak.check(model)


def gradients(model: nn.Module, optimizers: Optimizers, clock: Clock) -> None:
    """Raise TostError on a step whose gradients hold NaN or Inf."""
    bad = optimizers.not_finite(model)
    if bad:
        raise TostError(
            f"step {clock.step}: expected finite gradients, got NaN or Inf in {some(bad)}; "
            f"lower the learning rate, clip gradients, or check the data"
        )


def one_gradient(method: MaskMethod, optimizers: Optimizers) -> None:
    """Raise TostError where scores are to follow gradients of which the first moves the weights: SAM's, of removed ones too."""
    if isinstance(method, Scored) and optimizers.climb:
        raise TostError(
            f"mask {method.kind}: expected one gradient for each step, got {optimizers.climb[0]}, which takes two and moves "
            f"weights in between; leave it out, or use a mask under which weights train"
        )


def concealed(method: MaskMethod, revealed: bool) -> None:
    """Raise TostError for a gradient that comes while weights that train out of sight are in the network: it was computed
    with them."""
    if revealed:
        raise TostError(
            f"mask {method.kind}: expected one gradient for each step, got a second one while all weights are in the network "
            f"(SAM and LBFGS take several); use another optimizer, or a mask that does not hide, and a session each for "
            f"networks that step by turns (a GAN's)"
        )


def same_recipe(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise TostError unless a checkpoint's recipe has the mask and tweaks of this one, and trains the same part."""
    differ = [key for key in ("mask", "tweaks", "train") if _lasting(saved.get(key)) != _lasting(own.get(key))]
    if differ:
        raise TostError(
            f"load_state_dict: expected a checkpoint of the same {' and '.join(differ)}, got "
            f"{saved.get(differ[0])!r}; resume with the recipe that the run was started with"
        )


def _lasting(part: Any) -> Any:
    """A part of a recipe without what is over when a run goes on: how long rescaled_init took."""
    if isinstance(part, list):
        return [_lasting(tweak) for tweak in part]
    over = "iterations" if isinstance(part, dict) and part.get("kind") == "rescaled_init" else None
    return {key: value for key, value in part.items() if key != over} if isinstance(part, dict) else part


def times(parts: Iterable[Any], clock: Clock) -> None:
    """Raise TostError for a time in a recipe that the run's clock cannot convert."""
    for part in parts:
        for name, time in times_of(part).items():
            try:
                time.steps(clock)
            except TostError as error:
                raise error.at(f"{part.kind}.{name}") from None


def over(method: MaskMethod, at_work: Mapping[str, Any], clock: Clock, gone_back: bool) -> None:
    """Warn where tweaks are still at work, or the mask still moves, at the end. Raises TostError where the run has gone
    back to a checkpoint of such a moment: the plain network is another than that."""
    if at_work and gone_back:
        raise TostError(
            f"finish: expected a checkpoint from after the ghosts and soft activations have ended, got one of step "
            f"{clock.step} ({dict(at_work)}), which is another network without them; load a later one, or train on"
        )
    live = dict(at_work)
    if isinstance(method, Moving) and hasattr(method, "until") and not method.settled(clock):
        live["mask"] = "moving"
    if live:
        say(
            f"finish at step {clock.step}, before the schedules ended ({live}): the network changes "
            f"abruptly and may lose accuracy",
            logging.WARNING,
        )


def fewer(method: MaskMethod, weights: MaskedWeights, clock: Clock) -> None:
    """Warn where a mask that moves has ended before it removed what it is to remove."""
    wanted, size = getattr(method, "sparsity", None), weights.size
    if not isinstance(method, Moving) or wanted is None or (method.settled(clock) and not weights.frozen):
        return
    if weights.count - round((1 - wanted) * size) > len(weights.weights):  # each layer may round up
        left = some(weights.frozen, 3)
        layers = f"mask {method.kind} left {left} alone, which did not train when it moved; train them up to its end"
        why = layers if method.settled(clock) else f"mask {method.kind} was not there yet; train on"
        say(
            f"finish at step {clock.step}: the network keeps {weights.count:,} of {size:,} weights, where a sparsity of "
            f"{wanted:g} keeps {round((1 - wanted) * size):,}: {why}",
            logging.WARNING,
        )


def still(method: MaskMethod, clock: Clock) -> None:
    """Say that a mask that is to move does not in so short a run."""
    steps = clock.total_steps
    if not isinstance(method, Moving) or steps is None or not hasattr(method, "every"):
        return
    begin, every, until = (
        getattr(method, name).steps(clock) if hasattr(method, name) else 0 for name in ("begin", "every", "until")
    )
    moments = {begin, begin + max(1, every), until}  # the first move is at one of these
    if not any(method.due(clock.at(step)) for step in moments if step < steps):
        say(f"mask {method.kind}: does not move in a run of {steps} steps; set a shorter `every`", logging.WARNING)


def diverged(weights: MaskedWeights) -> None:
    """The last step may have blown weights up, which no gradient tells any more: warn, and keep zeros outside the mask."""
    bad = not_finite({name: param for name, param in weights.weights.items() if param.numel()})
    if bad:
        weights.zero(diverged=True)
        say(
            f"finish: expected finite weights, got NaN or Inf in {some(bad)}; lower the learning rate, or take an "
            f"earlier checkpoint",
            logging.WARNING,
        )
