"""Which parameters train: all that require grad, or those of the norms alone."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.masks.scoring import NORMS
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name

#: A recipe's key `train`.
Train = Literal["all", "norms"]

_FROZEN = "tost_frozen"  # the model's list of what this has frozen: a copy of an attached model has it too
_CALLED_NORM = re.compile(r"Norm(\dd)?$")  # T5LayerNorm, LlamaRMSNorm, LayerNorm2d: classes that are none of torch's


class NormsAlone:
    """With "norms" nothing but the scales and shifts (gamma, beta) of norm layers trains, from attach to finish.

    The others are frozen (`requires_grad` off, no gradient), which optimizers pass over whatever their weight decay.
    DDP looks at this when it wraps the model: attach first.

    Paper: Frankle, Schwab and Morcos, Training BatchNorm and Only BatchNorm, ICLR 2021.
    Differs from the paper: layer, group, instance and RMS norms count as well.
    """

    def __init__(self, model: nn.Module, train: Train) -> None:
        self.model, self.train = model, train

    def look(self) -> None:
        """Before attach: raises TostError without a norm that trains. A copy of an attached model trains as a whole again."""
        self.thaw()
        if self.train == "norms" and not any(param.requires_grad for param in norm_parameters(self.model)):
            raise TostError(
                f"train norms: expected norm layers whose scale and shift train, got none in {type(self.model).__name__}; "
                f"leave `train` out, or take a network with norms"
            )

    def freeze(self) -> None:
        """Let nothing else train."""
        if self.train == "all":
            return
        trains = {id(param) for param in norm_parameters(self.model)}
        others = {
            name: param
            for name, param in self.model.named_parameters()
            if param.requires_grad and id(param) not in trains
        }
        for param in others.values():
            param.requires_grad_(False)
            param.grad = None
        setattr(self.model, _FROZEN, [clean_name(name) for name in others])
        trained = sum(param.numel() for param in self.model.parameters() if param.requires_grad)
        total = sum(param.numel() for param in self.model.parameters())
        say(f"train norms: {trained:,} of {total:,} parameters train")

    def check(self, optimizers: Optimizers | None) -> None:
        """Raise TostError where nothing that trains is in the optimizers."""
        if self.train == "all" or optimizers is None:
            return
        held = {id(param) for group in optimizers.groups() for param in group["params"]}
        if not any(id(param) in held for param in norm_parameters(self.model) if param.requires_grad):
            raise TostError(
                "train norms: expected an optimizer that has the norms' scales and shifts, got one without; make it from "
                "model.parameters()"
            )

    def thaw(self) -> None:
        """Let all train again that did before."""
        frozen = getattr(self.model, _FROZEN, None)
        if frozen is None:
            return
        delattr(self.model, _FROZEN)
        for name, param in self.model.named_parameters():
            if clean_name(name) in frozen:
                param.requires_grad_()


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and shifts of a network's norm layers, those of ghosts too.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        >>> [tuple(param.shape) for param in norm_parameters(net)]
        [(4,), (4,)]
    """
    norms = (m for m in model.modules() if isinstance(m, NORMS) or _CALLED_NORM.search(type(m).__name__))
    return [param for module in norms for param in module.parameters(recurse=False)]
