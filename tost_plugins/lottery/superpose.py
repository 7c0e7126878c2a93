"""Sup-tickets: several sparse networks of one run superposed, and the learning rate of the short cycles that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tost_plugins.errors import TostError, from_pydantic, shown
from tost_plugins.masks.allocation import kept_count
from tost_plugins.masks.base import Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import top_mask


def triangular(step: int, steps: int, low: float, high: float) -> float:
    """The learning rate of step 0 to `steps` of a cycle: from `low` straight up to `high` in its middle, and down again.

    Example:
        >>> [triangular(step, 4, 1.0, 5.0) for step in range(5)]
        [1.0, 3.0, 5.0, 3.0, 1.0]
    """
    if not 0 <= step <= steps or steps < 1:
        raise TostError(
            f"triangular: expected a step from 0 to {steps}, got {step}; count the steps of each cycle anew"
        )
    return low + (high - low) * (1 - abs(2 * step / steps - 1))


@torch.no_grad()
def superpose(
    tickets: Sequence[Mapping[str, Tensor]], masks: Sequence[Mask], sparsity: float
) -> tuple[dict[str, Tensor], Mask]:
    """One sparse network from several: the state dict, and its mask of exactly round((1 - sparsity) * N) weights.

    `tickets` are state dicts of one network, `masks` which of their weights they keep. Each weight is averaged over the tickets
    that keep it; of these averages those with the largest magnitude stay, over all layers, ties to the lower index. All other
    numbers are averaged over all tickets; integers and bools, such as a batch norm's count of its batches, are the last
    ticket's. The statistics of batch norms are those of other weights then, and have to be estimated again:
    `torch.optim.swa_utils.update_bn(train_loader, model)`. `sparsity` in [0, 1), 0 is dense. Nothing that is given is changed.
    Raises TostError on a sparsity outside of that, without tickets, where they or their masks are of different networks, on
    numbers that are not finite, and where the tickets together keep fewer weights than asked for.

    Paper: Yin et al., Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training, UAI 2022.
    Differs from the paper: the count is exact.

    Example:
        >>> tickets = [{"w": torch.tensor([4.0, 1.0, 0.0, 0.0])}, {"w": torch.tensor([2.0, 0.0, -2.0, 0.0])}]
        >>> network, mask = superpose(tickets, [Mask({"w": ticket["w"] != 0}) for ticket in tickets], sparsity=0.5)
        >>> network["w"].tolist()
        [3.0, 0.0, -2.0, 0.0]
    """
    sparsity, masks = _sparsity(sparsity), [mask if isinstance(mask, Mask) else Mask(mask) for mask in masks]
    _check(tickets, masks)
    counts = {name: torch.stack([mask[name] for mask in masks]).sum(0) for name in masks[0]}
    found = {name: _averaged([ticket[name] for ticket in tickets], counts.get(name)) for name in tickets[0]}
    kept, most = kept_count(sparsity, masks[0].size), sum(int((count > 0).sum()) for count in counts.values())
    if kept > most:
        raise TostError(
            f"superpose: expected tickets that together keep {kept} weights or more, got {most}; set a sparsity of at least "
            f"{1 - most / masks[0].size:.6g}"
        )
    scores = {name: wide(found[name].cpu()).abs().masked_fill(count == 0, -1) for name, count in counts.items()}
    mask = top_mask(scores, sparsity)
    mask.apply_(found)
    return found, mask


def _sparsity(value: float) -> float:
    try:
        return TypeAdapter(dict[str, Sparsity]).validate_python({"sparsity": value})["sparsity"]
    except ValidationError as error:
        raise from_pydantic("superpose", error) from None


def _averaged(values: Sequence[Tensor], count: Tensor | None) -> Tensor:
    """The mean, over those that keep a weight where that is counted: removed ones are 0, and so add nothing."""
    if not values[0].is_floating_point() and not values[0].is_complex():
        return values[-1].clone()
    total = torch.stack([wide(value) for value in values]).sum(0)
    divided = total / (len(values) if count is None else count.clamp(min=1).to(total.device))
    return divided.to(values[0].dtype)


def _check(tickets: Sequence[Mapping[str, Tensor]], masks: Sequence[Mask]) -> None:
    if not tickets or len(tickets) != len(masks):
        raise TostError(f"superpose: expected a mask for each of the tickets, got {len(masks)} and {len(tickets)}")
    for ticket, mask in zip(tickets, masks, strict=True):
        if not isinstance(ticket, Mapping) or not all(isinstance(value, Tensor) for value in ticket.values()):
            raise TostError(f"superpose: expected state dicts, got {shown(ticket)}; give model.state_dict() of each")
        if {name: value.shape for name, value in ticket.items()} != {n: v.shape for n, v in tickets[0].items()}:
            raise TostError("superpose: expected tickets of one network, got others; give the state dicts of one run")
        if list(mask) != list(masks[0]):
            raise TostError("superpose: expected masks of the same layers, got others; give the masks of one run")
        for name, kept in mask.items():
            if name not in ticket or ticket[name].shape != kept.shape:
                raise TostError(
                    f"superpose: expected a weight {name} that fits its mask, got none; give plain state dicts"
                )
            if bool(ticket[name].cpu()[~kept].any()):
                raise TostError(
                    f"superpose: expected zeros outside the mask, got others in {name}; finish() the run first"
                )
