"""Averaged weights (EMA, SWA): what averages a network with a session, and the plain sparse network of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.session import buffers
from tost_plugins.training.params import clean_name, is_layer, some


@torch.no_grad()
def plain(model: nn.Module, mask: Mask, average: nn.Module | Mapping[str, Tensor]) -> nn.Module:
    """See `Session.plain`."""
    if not isinstance(average, (nn.Module, Mapping)):
        raise TostError(
            f"plain: expected a copy of the attached model, or its state dict, got {type(average).__name__}; pass the network "
            f"that holds the average"
        )
    state = average if isinstance(average, Mapping) else average.state_dict()
    found = {clean_name(name): value for name, value in state.items()}
    network = copy.deepcopy(model)
    own = network.state_dict()
    _check_whole(network, found)
    lacks = [name for name in own if clean_name(name) not in found]
    if lacks or buffers.CLOCK not in found:
        raise TostError(
            f"plain: expected a copy of the attached model, got one without {some(lacks) or 'masks'}; "
            f"make the average after attach: AveragedModel pairs parameters by their order"
        )
    for name, value in own.items():
        value.copy_(found[clean_name(name)])
    mask.apply_({clean_name(name): param for name, param in network.named_parameters(remove_duplicate=False)})
    return network


def _check_whole(network: nn.Module, found: Mapping[str, Any]) -> None:
    """Raise TostError for the average of a part of the network, or of a network that it is a part of."""
    own = {clean_name(name): value.shape for name, value in network.state_dict().items()}
    if own.keys() <= found.keys():
        return
    there = {name: getattr(value, "shape", None) for name, value in found.items() if not buffers.of_a_session(name)}
    there.pop("n_averaged", None)  # AveragedModel's own
    for part in (clean_name(f"{name}.") for name, _ in network.named_modules() if name):
        if there and there == {name.removeprefix(part): own[name] for name in own if name.startswith(part)}:
            raise TostError(
                f"plain: expected an average of the whole network, got one of its part {part[:-1]!r}; average the model that the "
                f"session has"
            )
    first = min(own, default="")
    for around in sorted({name.removesuffix(first) for name in found if name.endswith(f".{first}")}):
        if all(there.get(f"{around}{name}") == shape for name, shape in own.items()):
            raise TostError(
                f"plain: expected an average of the network that the session has, got one of a network of which that is the "
                f"part {around[:-1]!r}; pass this part of it"
            )


def check_late(model: nn.Module) -> None:
    """Raise TostError for an AveragedModel within a model that is attached to: it pairs parameters and buffers by their order, in
    which ghosts and masks come between."""
    if found := within(model):
        raise TostError(
            f"attach: expected averages that are made after attach, got {some(found)} (AveragedModel), which pairs parameters "
            f"by their order; make it later, in a LightningModule in setup"
        )


def layers(model: nn.Module) -> list[str]:
    """The names of the layers that train, without those of averages."""
    averages = tuple(f"{name}." for name in within(model))
    return [
        name
        for name, part in model.named_modules()
        if is_layer(part) and any(param.requires_grad for param in part.parameters()) and not name.startswith(averages)
    ]


def within(model: nn.Module) -> list[str]:
    """The names of the averages within a model."""
    return [name for name, part in model.named_modules() if name and isinstance(part, AveragedModel)]


def with_bools(average: AveragedModel) -> None:
    """Let torch's own mean of parameters and buffers, which cannot subtract bools, take masks as they are."""
    if average.use_buffers and average.avg_fn is None and average.multi_avg_fn is None:
        average.avg_fn = _mean


def _mean(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    return current if current.dtype == torch.bool else averaged + (current - averaged) / (count + 1)
