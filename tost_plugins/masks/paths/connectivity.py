"""What a mask connects: which kept weights lie on a path from a network's inputs to its outputs, and which channels do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.ones import shapes
from tost_plugins.masks.paths.follow import Follow, Tape, Value
from tost_plugins.masks.paths.reach import Reach
from tost_plugins.training.batches import pick, walk
from tost_plugins.training.params import clean_name, plain_modules, some
from tost_plugins.training.task import Task, untouched

#: Sides of made-up images: small, and large enough that no weight of a usual network lies over the padding alone.
_SIDES = (64, 32, 224, 28)


@dataclass(frozen=True)
class LayerPaths:
    """One layer: its kept weights and those on a path, and of its output channels those that no path from the inputs reaches
    (`constant`) and those from which none leads to the outputs (`unread`); a channel may be both."""

    layer: str
    kept: int
    live: int
    channels: int
    constant: int
    unread: int
    dead: int  # channels that are either


@dataclass(frozen=True)
class Connectivity:
    """`live` are the kept weights on a path. `ends` is the layer at which the last path ends where no path is whole, None
    where one is; `empty` are the layers without any kept weight, `unseen` those that the forward pass did not run, which
    count as live; `lost` are the modules in which functions could not be followed: what goes into these counts as read."""

    live: Mask
    layers: tuple[LayerPaths, ...]
    ends: str | None
    empty: tuple[str, ...]
    unseen: tuple[str, ...]
    lost: tuple[str, ...]

    @property
    def connected(self) -> bool:
        """Whether any path leads from the inputs to the outputs."""
        return self.ends is None

    @property
    def kept_count(self) -> int:
        """How many weights are kept."""
        return sum(row.kept for row in self.layers)

    @property
    def live_count(self) -> int:
        """How many weights are live."""
        return sum(row.live for row in self.layers)


class Paths:
    """The forward pass of a task's network, followed once: it answers for any mask of that network.

    Raises TostError where the network does not run, or where nothing of its outputs descends from its inputs.
    """

    def __init__(self, task: Task) -> None:
        self.device, self.names, self.task = task.device, list(task.params), replace(task, batches=None)
        self.tape, self.batch = _followed(task)
        self.unseen = tuple(name for name in self.names if not any(self._reads(call, name) for call in self.tape.calls))

    def connectivity(self, mask: Mapping[str, Tensor]) -> Connectivity:
        """What this mask connects."""
        reach, outs = self._reach(mask), self._layers()
        joins, ways = reach.back([value for values in outs.values() for value in values])
        live = self._both(joins, mask)
        way = iter(ways)
        rows = [_row(name, mask[name], live[name], [(reach[v], next(way)) for v in outs[name]]) for name in self.names]
        whole = any(bool(reach[value].any()) for value in self.tape.outputs)
        return Connectivity(
            Mask(live), tuple(rows), None if whole else self._end(reach), tuple(row.layer for row in rows if not row.kept),
            self.unseen, tuple(dict.fromkeys(self.tape.lost)),
        )  # fmt: skip

    def live(self, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The kept weights on a path, on the network's device; all of a layer that the forward pass did not run."""
        return self._both(self.joins(mask), mask)

    def joins(self, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, kept or not, that lie on a path as soon as they are kept: each joins what a path from the inputs
        reaches to what leads to the outputs already; all of a layer that the forward pass did not run."""
        found, _ = self._reach(mask).back([])
        return found | {name: torch.ones_like(found[name]) for name in self.unseen}

    def outputs(self, mask: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """What the network in eval mode says under this mask to the batch that it was followed on, in a type or in its own."""
        weights = {
            clean_name(name): param.detach().to(dtype or param.dtype, copy=True)
            for name, param in self.task.model.named_parameters()
        }
        with untouched(self.task.model, train=False), torch.no_grad():
            for name, weight in self.task.leaves(weights).items():
                weight.mul_(mask[name].to(weight.device))
            batch = walk(lambda part: _cast(part, dtype), self.batch)
            found = list(_floats(self.task.outputs(weights, batch, dtype, labels=False)))
        return [tensor.detach().clone() for tensor in found if tensor.is_floating_point()]

    def _both(self, joins: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: mask[name].to(self.device) for name in self.names}
        return {name: kept[name] if name in self.unseen else joins[name] & kept[name] for name in self.names}

    def _reach(self, mask: Mapping[str, Tensor]) -> Reach:
        return Reach(self.tape, {name: mask[name].to(self.device) for name in self.names})

    def _layers(self) -> dict[str, list[Value]]:
        """What each layer returns, at each of its calls."""
        return {
            name: [
                call.outs[0]
                for call in self.tape.calls
                if call.kind in ("layer", "product") and self._reads(call, name)
            ]
            for name in self.names
        }

    def _reads(self, call: Any, name: str) -> bool:
        return self.tape.weights[name] in call.ins

    def _end(self, reach: Reach) -> str:
        """The last layer, in the order of the forward pass, that a path reaches and none leaves."""
        found = "the inputs"
        for call in self.tape.calls:
            ins = [reach[value] for value in call.ins if value.descends]
            names = [value.weight for value in call.ins if value.weight]
            if names and any(bool(r.any()) for r in ins) and not any(bool(reach[out].any()) for out in call.outs):
                found = str(names[0])
        return found


def live(model: nn.Module, mask: Mapping[str, Tensor], batch: Any = None) -> Mask:
    """The weights that a mask keeps and that lie on a path from the model's inputs to its outputs.

    A path leads through kept weights, and through everything that has no mask. The others change no output and have gradients
    of exactly 0 where they lead nowhere; behind a channel that nothing reaches they see a constant, and add one. Where numbers
    mix (layer norm, group norm, softmax, attention, functions that torch cannot show), all count as connected. `batch` is one
    that the model runs on, by default ones in a shape that fits the first layer: its height and width say which weights of a
    kernel lie over the padding alone. Layers that the forward pass does not run count as live.
    Raises TostError where the model does not run.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> mask = Mask({"0.weight": torch.tensor([[1, 0], [1, 1]]), "1.weight": torch.tensor([[0, 1]])})
        >>> live(net, mask)["0.weight"].tolist()
        [[False, False], [True, True]]
    """
    if not isinstance(mask, Mapping):
        raise TostError(
            f"live: expected a mask (name -> tensor), got {type(mask).__name__}; see masks.find and Mask.load"
        )
    from_batch = None if batch is None else [batch]
    task = Task.of(model, batches=from_batch)
    names = {name: task.params[name] for name in mask if name in task.params}
    fitted = Mask(mask).fit(names)
    return Paths(Task(model, names, from_batch)).connectivity(fitted).live


def refusal(found: Connectivity) -> TostError:
    """Why a mask that connects nothing cannot be trained with."""
    empty = f" (layers without any weight: {some(found.empty, 6)})" if found.empty else ""
    return TostError(
        f"expected a path of kept weights from the inputs to the outputs, got none: the last one ends at {found.ends}"
        f"{empty}; set a lower sparsity, budget: live where the method has it, another allocation, or another mask method"
    )


def _row(name: str, mask: Tensor, live: Tensor, calls: list[tuple[Tensor, Tensor]]) -> LayerPaths:
    kept, alive = int(mask.sum()), int(live.sum())
    if not calls:
        return LayerPaths(name, kept, alive, 0, 0, 0, 0)
    dim = -1 if mask.ndim == 2 else 1 - int(calls[0][0].ndim < mask.ndim)
    reached, read = (_channels(parts, dim) for parts in zip(*calls, strict=True))
    dead = int((~reached | ~read).sum())
    return LayerPaths(name, kept, alive, len(reached), int((~reached).sum()), int((~read).sum()), dead)


def _channels(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """Per channel, whether any number of it is not 0, at any of the calls."""
    found = [part.detach().movedim(dim, 0).unsqueeze(-1).flatten(1).sum(1) > 0 for part in parts]
    return torch.stack(found).any(0)


def _cast(part: Any, dtype: torch.dtype | None) -> Any:
    """A part of a batch to be written into."""
    if not isinstance(part, Tensor):
        return part
    return part.detach().to(dtype if dtype and part.is_floating_point() else part.dtype, copy=True)


def _followed(task: Task) -> tuple[Tape, Any]:
    """The tape, and the batch that the network ran on."""
    problem: BaseException | None = None
    with untouched(task.model, task.batches, train=False):
        weights = {clean_name(name): param.detach().clone() for name, param in task.model.named_parameters()}
        for batch in _samples(task):
            try:
                return _tape(task, weights, batch), batch
            except Exception as error:  # the user's network may raise anything
                problem = error.__cause__ or error
    raise TostError(
        f"connectivity: expected a network that runs on one batch, got {type(problem).__name__} ({problem}); pass batches"
    )


def _tape(task: Task, weights: dict[str, Tensor], batch: Any) -> Tape:
    follow, batch = Follow(task.leaves(weights), weights), walk(lambda part: _cast(part, None), batch)
    for tensor in _floats(batch):
        follow.begin(tensor.requires_grad_() if tensor.is_floating_point() else tensor)
    handles = [
        handle
        for path, module in plain_modules(task.model)
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
        for handle in _hooked(follow, clean_name(path), module)
    ]
    try:
        with follow:
            outputs = task.outputs(weights, batch, labels=False)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in _floats(outputs):
        follow.end(tensor)
    if not any(value.descends for value in follow.tape.outputs):
        raise TostError("expected outputs that descend from the inputs, got none")
    return follow.tape


def _hooked(follow: Follow, path: str, module: nn.Module) -> tuple[Any, Any]:
    looked_at = bool(module._forward_hooks or module._forward_pre_hooks)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        follow.enter(path)
        if looked_at:
            follow.show(args, kwargs)

    def leave(_: nn.Module, args: Any, out: Any) -> None:
        follow.leave()
        if looked_at:
            follow.show(out)

    return module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)


def _samples(task: Task) -> Iterator[Any]:
    """Two samples that the network may run on: of the batches where there are any."""
    if task.batches is not None:
        with suppress(TostError):  # what cannot be read twice, or is empty, is for others to complain of
            batch = task.take(1, "connectivity")[0]
            for some_of in (pick(batch, [0, 0]), batch):
                yield walk(lambda part: part.clone() if isinstance(part, Tensor) else part, some_of)
            return
    dtype = next((p.dtype for p in task.model.parameters() if p.is_floating_point()), torch.float32)
    for shape in shapes(task.model, _SIDES):
        yield (
            torch.ones(2, *shape, dtype=dtype, device=task.device),
            torch.zeros(2, dtype=torch.long, device=task.device),
        )


def _floats(tree: Any) -> Iterator[Tensor]:
    """The tensors in what a network takes or returns."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _floats(part)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _floats(part)
    elif hasattr(tree, "__dict__") and not isinstance(tree, nn.Module):
        yield from _floats(vars(tree))
