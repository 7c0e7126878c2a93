"""What a session asks of an optimizer: that it trains the weights, takes the ghosts in, and forgets what is masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.training.params import some
from tost_plugins.training.sharding import any_rank, local

#: A weight, and its mask in the weight's own dtype and on its device.
Masked = tuple[nn.Parameter, Tensor]


def innermost(optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> Optimizer:
    """The torch optimizer inside wrappers; raises TostError unless it trains all of `params` that require grad."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    missing = [name for name, param in params.items() if param.requires_grad and id(param) not in held]
    if missing:
        raise TostError(
            f"optimizer: expected one that trains every prunable weight of the model, got one without "
            f"{some(missing)}; make it from model.parameters() of this very model, or `ignore` them"
        )
    return optimizer


def join(optimizer: Optimizer, companions: Iterable[tuple[nn.Parameter, nn.Parameter]], model: nn.Module) -> None:
    """Put each added parameter into the group of the parameter beside it, if the optimizer lacks it, and its name where the
    optimizer was made from named parameters."""
    group_of = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    names = {id(param): name for name, param in model.named_parameters()}
    for param, beside in companions:
        if id(param) not in group_of and id(beside) in group_of:
            group_of[id(beside)]["params"].append(param)
            if "param_names" in group_of[id(beside)]:
                group_of[id(beside)]["param_names"].append(names[id(param)])


def leave(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> None:
    """Take parameters out of their groups, and their state with them."""
    gone = {id(param) for param in params}
    for group in optimizer.param_groups:
        stay = [id(param) not in gone for param in group["params"]]
        for param in compress(group["params"], [not here for here in stay]):
            optimizer.state.pop(param, None)
        for key in {"params", "param_names"} & group.keys():
            group[key] = list(compress(group[key], stay))


@torch.no_grad()
def mask_weights(masked: Sequence[Masked], optimizer: Optimizer | None) -> None:
    """Set weights, and the numbers that the optimizer keeps in their shape, to exactly 0 outside the masks.

    Integers, which count or stand for quantized numbers, are left alone.
    """
    if not masked:
        return
    torch._foreach_mul_([local(param) for param, _ in masked], [local(mask) for _, mask in masked])
    for param, mask in masked:
        for value in state_of(param, optimizer):
            value.mul_(mask)


def state_of(param: nn.Parameter, optimizer: Optimizer | None) -> list[Tensor]:
    """The floating point numbers that the optimizer keeps for each number of a weight: momentum and the like."""
    state = {} if optimizer is None else optimizer.state.get(param, {})
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == param.shape and v.is_floating_point()]


@torch.no_grad()
def fill_weights(masked: Sequence[Masked]) -> None:
    """Set weights outside the masks to exactly 0, also where they are NaN or Inf, which a product would not mend."""
    for param, mask in masked:
        param.masked_fill_(mask == 0, 0)


@torch.no_grad()
def mask_gradients(masked: Sequence[Masked]) -> None:
    """Set gradients to 0 outside the masks."""
    for param, mask in masked:
        if param.grad is not None:
            param.grad.mul_(mask)


def drop_gradients(optimizer: Optimizer) -> None:
    """Make the step that follows change nothing: optimizers pass over parameters without a gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


def not_finite(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of parameters whose gradients hold NaN or Inf; where ranks hold parts, a rank that has none itself names
    the others."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads or not any_rank(not _all_finite(grads), grads[0]):
        return []
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, grad in named.items() if not _all_finite([grad])] or ["the parts of other ranks"]


def diverged(params: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of weights that hold NaN or Inf."""
    weights = [param.detach() for param in params.values() if param.numel()]
    if not weights or _all_finite(weights):
        return []
    return [name for name, param in params.items() if param.numel() and not _all_finite([param])]


def _all_finite(grads: list[Tensor]) -> bool:
    """A sum, or a norm where one kernel takes all, is many times as fast as looking at each number; where it overflows,
    as in float16, look closer."""
    parts = [part for grad in grads if (part := local(grad.detach())).numel()]
    parts = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    if not parts:
        return True
    found = [part.sum() for part in parts] if parts[0].is_cpu else torch._foreach_norm(parts)
    if bool(torch.stack([each.float() for each in found]).isfinite().all()):
        return True
    return all(bool(part.isfinite().all()) for part in parts)
