"""Which channels of a sparse network say something: a ghost in any other would vanish with all that relies on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.training import ranks
from tost_plugins.training.log import say
from tost_plugins.training.task import Task, untouched

#: A convolution, and the module whose output gets the ghost: the norm behind it, or the convolution itself.
Place = tuple[Any, nn.Module]


def alive_channels(task: Task, mask: Mapping[str, Tensor], places: Sequence[Place]) -> list[Tensor]:
    """For each place the channels that are alive, as bools `(C,)`.

    A channel is dead if in the masked network it has one value whatever the image: its filter has lost all weights, or
    all that its filter reads is dead. What looks at data is the first batch, in train mode and without a trace; without
    batches that can be read twice and that the network runs on, filters are looked at alone. Rank 0 decides for all.
    """
    found = [_has_weights(task, mask, conv) for conv, _ in places]
    if task.batches is not None:
        found = [own & varies for own, varies in zip(found, _varying(task, mask, places), strict=True)]
    shared = ranks.broadcast({str(i): alive for i, alive in enumerate(found)}, task.device)
    return list(shared.values())


def _has_weights(task: Task, mask: Mapping[str, Tensor], conv: Any) -> Tensor:
    """The filters with a weight left; all of them where the convolution has no mask."""
    keep = next((mask[name] for name, param in task.params.items() if param is conv.weight), None)
    return torch.ones(conv.out_channels, dtype=torch.bool) if keep is None else keep.cpu().flatten(1).any(1)


def _varying(task: Task, mask: Mapping[str, Tensor], places: Sequence[Place]) -> list[Tensor]:
    """The channels that differ over the first batch, in any of the calls of a place."""
    found = [torch.zeros(conv.out_channels, dtype=torch.bool) for conv, _ in places]

    def look(i: int, x: Tensor) -> None:
        values = x.detach().float().movedim(1, 0).flatten(1)
        found[i] |= (values.amax(1) - values.amin(1) > 1e-6 * values.abs().max()).cpu()

    def watch(i: int, conv: Any, place: Any) -> Any:
        if place is conv:
            return place.register_forward_hook(lambda _, args, output: look(i, output))
        return place.register_forward_pre_hook(lambda _, args: look(i, args[0]))

    with untouched(task.model, task.batches, train=True), torch.no_grad():
        weights = task.weights()
        for name, weight in task.leaves(weights).items():
            weight.mul_(mask[name].to(weight.device))
        handles = [watch(i, conv, place) for i, (conv, place) in enumerate(places)]
        try:
            task.outputs(weights, task.take(1, "ghost_skip")[0])
        except Exception as error:  # a trainer may take columns out of the batches that the network does not know
            say(
                f"ghost_skip: the network does not run on the batches as they are ({type(error).__name__}: {error}), so dead "
                f"channels are those without weights"
            )
            return [torch.ones_like(alive) for alive in found]
        finally:
            for handle in handles:
                handle.remove()
    return found
