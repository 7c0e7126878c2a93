"""One call that finds a mask, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tost_plugins.errors import TostError, from_pydantic, unknown
from tost_plugins.masks import connected
from tost_plugins.masks.base import MaskMethod, Moving, WithWeights
from tost_plugins.masks.card import told
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods import MASKS
from tost_plugins.training import ranks, seeds
from tost_plugins.training.by_hand import names
from tost_plugins.training.calling import call
from tost_plugins.training.log import say
from tost_plugins.training.params import prunable, unwrap
from tost_plugins.training.reading import reading
from tost_plugins.training.task import Task


def find(
    model: nn.Module,
    kind: str | MaskMethod,
    sparsity: float | None = None,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    forward: Callable[[Any, Any], Any] = call,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> Mask:
    """Find a mask for a model in one call, for any training loop; the model is left as it was.

    `kind` is a name in `MASKS`, with `sparsity` (share of removed weights in [0, 1), 0 is dense) and
    `options` for its fields, or a method made already, such as `Snip(sparsity=0.9, batches=4)`. Methods
    that look at data take `batches` (a DataLoader or a list, not an iterator) and `loss_fn(outputs,
    labels)`, of the outputs as they are or of their class scores, by default the loss that the model
    returns, or cross entropy. Other networks than those of docs/adapters.md: `forward(model, batch)` says
    how the model is called, `criterion(outputs, batch)` what its loss is. Wrappers (DDP, torch.compile) are
    looked through. Of a mask that moves while the network trains the first one is found, and a line says so.
    With torch.distributed, call it on every rank: all get the same mask. Raises TostError, which starts with
    `masks.find(kind)`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> mask = find(net, "synflow", 0.75)
        >>> mask.kept
        20
        >>> mask.apply_(dict(net.named_parameters()))
    """
    where = f"masks.find({kind if isinstance(kind, str) else getattr(kind, 'kind', kind)})"
    options |= {} if sparsity is None else {"sparsity": sparsity}
    try:
        if not isinstance(model, nn.Module):
            raise TostError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the network")
        seed, method = seeds.given(seed), _method(kind, options)
        task = Task(unwrap(model), prunable(unwrap(model), method.ignore), batches, loss_fn, forward, criterion)
        return run(method, task, seed)
    except ValidationError as error:
        raise from_pydantic(where, error, keys={"": names(MASKS[str(kind)])}) from None
    except TostError as error:
        raise error.at(where) from None


def run(method: MaskMethod, task: Task, seed: int) -> Mask:
    """What `search` finds, checked: raises TostError also where no path of it leads from the inputs to the outputs. A line
    says where it is the first of a mask that moves."""
    with reading(task.batches, task.device):  # once, for both
        mask = search(method, task, seed)
        found = connected.check(mask, connected.followed(task))
    if found is not None:
        mask = mask.described(live={name: int(live.sum()) for name, live in found.live.items()})
    if isinstance(method, Moving):
        say(
            f"mask {method.kind}: this mask moves while the network trains, and is found as it starts: sparsity "
            f"{mask.sparsity:.4f}; train with a recipe that has it for the one it ends as"
        )
    return mask


def search(method: MaskMethod, task: Task, seed: int) -> Mask:
    """The method's mask for this task, the same on every rank: rank 0's. Randomness comes from `seed`
    alone.

    Raises TostError where the method does, and when the mask does not have exactly the layers of
    `task.params`.
    """
    mask = method.start(task, torch.Generator().manual_seed(seed)).fit(task.params)
    about = told(method, seed) | ({"source": dict(mask.about)} if mask.about else {})  # of a file, say
    mask = Mask(ranks.broadcast(mask, task.device)) if ranks.world() > 1 else mask
    return mask.described(**about)


def starting_weights(method: MaskMethod, task: Task, mask: Mask, seed: int) -> dict[str, Tensor]:
    """The weights that come with this mask, which `search` has found, the same on every rank: rank 0's; {} for most methods."""
    if not isinstance(method, WithWeights):
        return {}
    return ranks.broadcast(method.starting_weights(task, mask, torch.Generator().manual_seed(seed)), task.device)


def _method(kind: str | MaskMethod, options: dict[str, Any]) -> MaskMethod:
    if not isinstance(kind, str):
        if isinstance(kind, type) or not hasattr(kind, "start"):
            raise TostError(
                f"kind: expected a name or a method that is made already, got {kind!r}; known: {', '.join(MASKS)}"
            )
        if options:
            raise TostError(
                f"expected no options beside a method that is made already, got {', '.join(options)}; "
                f"give them to {type(kind).__name__}(...)"
            )
        return kind
    if kind not in MASKS:
        raise unknown("kind", "mask method", kind, MASKS)
    return TypeAdapter[Any](MASKS[kind]).validate_python({**options, "kind": kind})
