"""Which numbers of a forward pass lie on a path: from the inputs, and to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tost_plugins.masks.paths import rules
from tost_plugins.masks.paths.follow import Call, Constant, Tape, Value


class Reach:
    """The reaches of all values of a tape under a mask, `kept` (0 and 1, by name), and after `back` the way from each to the
    outputs."""

    def __init__(self, tape: Tape, kept: Mapping[str, Tensor]) -> None:
        self.tape = tape
        self.kept = {name: keep.detach().float().requires_grad_() for name, keep in kept.items()}
        self.like: dict[str, Any] = {"device": next(iter(self.kept.values())).device, "dtype": torch.float32}
        self._of: dict[Value, Tensor] = {value: torch.ones(value.shape, **self.like) for value in tape.inputs}
        self._of |= {value: self.kept[name] for name, value in tape.weights.items()}
        with torch.enable_grad():
            for call in tape.calls:
                for value, reach in zip(call.outs, self._found(call), strict=True):
                    self._of[value] = rules.whether(reach)

    def __getitem__(self, value: Value) -> Tensor:
        """1 where a path from the inputs reaches, 0 elsewhere, in the shape of the real tensor."""
        return self._of[value]

    @torch.enable_grad()
    def back(self, watched: list[Value]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Which weights, kept or not, join what a path from the inputs reaches to what leads to the outputs, by name; and from
        which numbers of the `watched` values a path leads to the outputs."""
        total = torch.stack([self._of[value].sum() for value in self.tape.outputs]).sum()
        asked = [*self.kept.values(), *(self._of[value] for value in watched)]
        known = [part.requires_grad for part in asked]
        needed = [part for part, knows in zip(asked, known, strict=True) if knows]
        grads = iter(
            torch.autograd.grad(total, needed, allow_unused=True) if total.requires_grad else [None] * len(needed)
        )
        found = [next(grads) if knows else None for knows in known]
        ways = [torch.zeros_like(like, dtype=torch.bool) if way is None else way > 0
                for way, like in zip(found, asked, strict=True)]  # fmt: skip
        return dict(zip(self.kept, ways, strict=False)), ways[len(self.kept) :]

    def _found(self, call: Call) -> list[Tensor]:
        """The reaches of what a call returns."""
        ins = call.ins
        descends = [self._of[value] for value in ins if value.descends]
        weights = [self._of[value] for value in ins if not value.descends]
        found = self._by_rule(call, descends, weights)
        return found or [rules.mixed(value.shape, descends, weights) for value in call.outs]

    def _by_rule(self, call: Call, descends: list[Tensor], weights: list[Tensor]) -> list[Tensor] | None:
        kind, shapes = call.kind, [value.shape for value in call.outs]
        first = call.args[0] if call.args else call.kwargs.get("input")
        if kind == "each":
            each = [rules.each(shape, descends or weights) for shape in shapes]
            return None if any(reach is None for reach in each) else each  # type: ignore[return-value]
        if kind in ("shape", "write"):
            return self._moved(call, bool(descends), shapes)
        if not (isinstance(first, Value) and first.descends):
            return self._product(call, descends) if kind == "product" else None
        reach = self._of[first]
        if kind == "layer":
            return [self._layer(call, reach)]
        if kind == "pool":
            return [rules.pool(call.name, reach, call.args, call.kwargs, shape) for shape in shapes]
        if kind == "largest":
            found = [rules.largest(reach, call.args, call.kwargs, shape) for shape in shapes]
            return None if any(part is None for part in found) else found  # type: ignore[return-value]
        if kind == "norm":
            return [rules.norm(call.name, reach, call.args, call.kwargs)]
        return self._product(call, descends) if kind == "product" else None

    def _layer(self, call: Call, reach: Tensor) -> Tensor:
        """A convolution or a linear layer: paths lead through kept weights."""
        named = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        rest = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}
        assert call.function is not None
        return call.function(reach, self._factor(named["weight"]), None, *call.args[3:], **rest)

    def _product(self, call: Call, descends: list[Tensor]) -> list[Tensor] | None:
        """A product of matrices of which one descends from the inputs; of two that do, everything mixes."""
        added = call.name == "addmm"
        if len(descends) != 1 or call.kwargs or (added and isinstance(call.args[0], Value) and call.args[0].descends):
            return None
        changed = tree_map(self._factor, call.args, is_leaf=_is_part)
        if added:
            changed = (torch.zeros(call.args[0].shape, **self.like), *changed[1:])
        assert call.function is not None
        return [call.function(*changed)]

    def _moved(self, call: Call, descends: bool, shapes: list[torch.Size]) -> list[Tensor] | None:
        """A function that moves numbers or adds them, done with their reaches."""

        def inside(part: Any) -> Any:
            if isinstance(part, Value) and (part.descends or not descends):
                return self._of[part]
            return torch.zeros(part.shape, **self.like) if isinstance(part, (Value, Constant)) else part

        args, kwargs = (tree_map(inside, part, is_leaf=_is_part) for part in (call.args, call.kwargs))
        kwargs.pop("dtype", None)
        if "cubic" in str(kwargs.get("mode", "")) or call.function is None:
            return None  # has factors below 0
        try:
            if call.kind == "write":
                out: Any = args[0].clone()
                call.function(out, *args[1:])
            else:
                out = call.function(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError):  # an index that descends from the inputs, say
            return None
        found = [part for part in tree_flatten(out)[0] if isinstance(part, Tensor)]
        return found if [part.shape for part in found] == shapes else None

    def _factor(self, part: Any) -> Any:
        """A factor of a product: what a weight keeps, and 1 for what is constant."""
        if isinstance(part, Value):
            return self._of[part]
        return torch.ones(part.shape, **self.like) if isinstance(part, Constant) else part


def _is_part(part: Any) -> bool:
    return isinstance(part, (Value, Constant))
