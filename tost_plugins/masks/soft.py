"""Soft subnetworks: a mask that keeps every weight, the major ones whole and the minor ones in part, and sessions of training
that change the minor ones alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.training import seeds
from tost_plugins.training.params import clean_name, matches, some


def soft(mask: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Name -> float32 factors in the shape of each mask, on the CPU: 1 for what it keeps, the major weights, and a number
    drawn from U(0, 1), 1 apart, for each of the others, the minor ones.

    The mask is that of the highest scores, learned or found by any method. The same seed draws the same numbers.

    Paper: Kang et al., On the Soft-Subnetwork for Few-shot Class Incremental Learning, ICLR 2023.
    Differs from the paper: the major weights are those of any mask; the paper learns scores for them.

    Example:
        >>> factors = soft({"w": torch.tensor([True, False, False, True])}, seed=0)["w"]
        >>> [round(value, 2) for value in factors.tolist()]
        [1.0, 0.77, 0.09, 1.0]
    """
    if not isinstance(mask, Mapping):
        raise TostError(f"soft: expected a mask (name -> tensor), got {type(mask).__name__}; see masks.find")
    try:
        generator = torch.Generator().manual_seed(seeds.given(seed))
    except TostError as error:
        raise error.at("soft") from None
    found = {}
    for name, kept in mask.items():
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TostError(f"soft: expected a mask of bools for {name}, got {got}; pass a Mask")
        found[name] = torch.rand(kept.shape, generator=generator).masked_fill_(kept.cpu(), 1)
    return found


@torch.no_grad()
def soften_(tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """Multiply the tensors of the same names by their factors, in place: the major weights stay what they are, bit for bit.

    Once, at the end of the first session: afterwards the network computes with these products. Raises TostError where a tensor
    is missing or has another shape.

    Example:
        >>> weight = torch.tensor([2.0, 2.0])
        >>> soften_({"w": weight}, {"w": torch.tensor([1.0, 0.25])})
        >>> weight.tolist()
        [2.0, 0.5]
    """
    _check("soften_", tensors, factors)
    for name, factor in factors.items():
        tensors[name].mul_(factor.to(tensors[name].device))


@contextlib.contextmanager
def minors_only(
    model: nn.Module, factors: Mapping[str, Tensor], optimizer: Optimizer, also: str | Sequence[str] = ()
) -> Iterator[None]:
    """Within: `optimizer` changes the minor weights alone, each by its factor times the gradient; nothing else of the
    parameters changes, bit for bit, whatever weight decay and momentum do.

    `factors` are those of `soft`: 1 is major. `also` are globs of parameters, by their names or their layers', that train as
    ever: the head of new classes, say. The others' gradients are 0, and what the optimizer makes of them is undone. What batch
    norms count goes on in train mode: `model.eval()` keeps that, too. Wrappers (DDP) are looked through. Raises TostError on
    factors without a parameter, or outside of [0, 1], on a glob that matches none, and on an optimizer without the weights.

    Paper: Kang et al., On the Soft-Subnetwork for Few-shot Class Incremental Learning, ICLR 2023.
    Differs from the paper: nothing.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data, optimizer = torch.tensor([[3.0, 3.0]]), torch.optim.SGD(net.parameters(), lr=1.0)
        >>> with minors_only(net, {"weight": torch.tensor([[1.0, 0.5]])}, optimizer):
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> net.weight.tolist()
        [[3.0, 2.5]]
    """
    params = {clean_name(name): param for name, param in model.named_parameters()}
    _check("minors_only", params, factors)
    if not isinstance(optimizer, Optimizer):
        raise TostError(f"minors_only: expected an optimizer, got {type(optimizer).__name__}; pass the one that steps")
    free = _free(params, factors, (also,) if isinstance(also, str) else also)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if missing := [name for name in factors if id(params[name]) not in held]:
        raise TostError(
            f"minors_only: expected an optimizer that trains {some(missing)}, got one without; add these to it"
        )
    before = {name: param.detach().clone() for name, param in params.items() if name not in free}
    moves = {name: (factor < 1).to(params[name].device) for name, factor in factors.items()}

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for name, value in before.items():
            params[name].copy_(torch.where(moves[name], params[name], value) if name in moves else value)

    with contextlib.ExitStack() as stack:
        for name in before:
            if params[name].requires_grad:  # gradients of what stays are 0, so that clipping sees the others alone
                scale = (factors[name] * (factors[name] < 1)).to(params[name]) if name in factors else 0.0
                stack.callback(params[name].register_hook(lambda grad, scale=scale: grad * scale).remove)
        stack.callback(optimizer.register_step_post_hook(put_back).remove)
        yield


def _free(params: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor], also: Sequence[str]) -> set[str]:
    """The parameters that train as ever."""
    found: set[str] = set()
    for glob in also:
        named = {n for n in params if n not in factors and (matches(n, glob) or matches(n.rpartition(".")[0], glob))}
        both = [n for n in factors if matches(n, glob) or matches(n.rpartition(".")[0], glob)]
        if both:
            raise TostError(
                f"minors_only: expected `also` to match parameters without factors, got {glob!r}, which matches {some(both)}; "
                f"leave these out of the mask (`ignore`), or out of the factors"
            )
        if not named:
            raise TostError(
                f"minors_only: expected globs that match other parameters, got {glob!r}; there are {some(dict(params))}"
            )
        found |= named
    return found


def _check(where: str, tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    given = (
        [*tensors.values(), *factors.values()]
        if isinstance(factors, Mapping) and isinstance(tensors, Mapping)
        else [None]
    )
    if not all(isinstance(each, Tensor) for each in given):
        raise TostError(
            f"{where}: expected names and their tensors, got others; pass named parameters, and masks.soft(mask)"
        )
    for name, factor in factors.items():
        if name not in tensors or tensors[name].shape != factor.shape:
            raise TostError(
                f"{where}: expected a tensor {name} of shape {tuple(factor.shape)}, got "
                f"{tuple(tensors[name].shape) if name in tensors else None}; pass factors that were made for this network"
            )
        if factor.dtype == torch.bool:
            raise TostError(
                f"{where}: expected factors from 0 to 1, got a mask for {name}; pass masks.soft(mask, seed)"
            )
        if not bool(((factor >= 0) & (factor <= 1)).all()):
            raise TostError(f"{where}: expected factors from 0 to 1, got others for {name}; pass those of masks.soft")
