"""One forward pass of a network, written down function by function: what later questions about paths are answered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from tost_plugins.masks.paths.rules import kind_of

#: What takes a type and a device, but no numbers, from all arguments but the first.
_TYPES = (Tensor.to, Tensor.type_as)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the forward pass, without its numbers. `descends`: from the inputs, otherwise from prunable weights alone;
    `weight` is the name of the weight that it is."""

    shape: torch.Size
    descends: bool
    weight: str | None = None


@dataclass(frozen=True)
class Constant:
    """A floating-point tensor that descends from no input and no prunable weight: biases, norms, frozen layers."""

    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Call:
    """One function and what it was given, with a Value or a Constant in the place of each tensor of floating point (and in
    that of every other one that descends from the inputs). A function that nobody could see is None: all that came before may
    have gone into it. `module` is the path of the innermost module that called it."""

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Value]
    module: str = ""

    @property
    def kind(self) -> str:
        """The kind of its rule, see `rules`."""
        return "mix" if self.function is None else kind_of(self.function)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", str(self.function))

    @property
    def ins(self) -> list[Value]:
        """All that it was given and that descends from an input or a prunable weight."""
        return [part for part in tree_flatten((self.args, self.kwargs))[0] if isinstance(part, Value)]


@dataclass
class Tape:
    """The calls of a forward pass in their order, its inputs, its outputs, what hooks of others have `seen` on the way,
    where it could not be followed, and the names of the parameters that went into anything."""

    calls: list[Call] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    seen: list[Value] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)


class Follow(TorchFunctionMode):
    """Within: calls are written to `tape`. `weights` are the prunable ones by name, as the network is run with them, and
    `params` all that there are.

    No weight is to have gradients and the inputs are to have them: then a tensor that requires gradients, and that nobody
    has seen, has come out of something that cannot be followed, such as a compiled function.
    """

    def __init__(self, weights: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._params = {id(param): name for name, param in params.items()}
        self.tape = Tape()
        self._known: dict[int, Value] = {}
        self._alive: list[Any] = []  # an id is taken only once while its tensor lives
        self._inside: list[str] = []
        self._stale: dict[int, list[Value]] = {}  # tensor -> what others have written into its memory since
        for name, weight in weights.items():
            self.tape.weights[name] = self._note(weight, Value(weight.shape, False, name))

    def begin(self, tensor: Tensor) -> None:
        """An input."""
        self.tape.inputs.append(self._note(tensor, Value(tensor.shape, True)))

    def end(self, tensor: Tensor) -> None:
        """An output."""
        if tensor.requires_grad or id(tensor) in self._known:
            self.tape.outputs.append(self._value(tensor))

    def show(self, *trees: Any) -> None:
        """Somebody looks at these."""
        self.tape.seen += [self._known[id(tensor)] for tensor in _tensors(trees) if id(tensor) in self._known]

    def enter(self, path: str) -> None:
        """From now on inside this module."""
        self._inside.append(path)

    def leave(self) -> None:
        """Outside of the innermost module again."""
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        told = (args[:1], {}) if func in _TYPES else (args, kwargs)
        asked = [tensor for tensor in _tensors(told) if id(tensor) in self._known or tensor.requires_grad]
        if func is Tensor.__setitem__ and _is_place(*args):  # `x[i] += y` writes twice, and the same
            self._stale.pop(id(args[0]), None)
        values = [self._value(tensor) for tensor in asked]
        given = tree_map(self._written, told[0]), tree_map(self._written, told[1])
        versions = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        self.tape.used.update(self._params[id(tensor)] for tensor, _ in versions if id(tensor) in self._params)
        out = func(*args, **kwargs)
        outs = [args[0]] if kind_of(func) == "write" else list(_tensors(out))
        if values and outs:
            descends = any(value.descends for value in values)
            made = [self._note(tensor, Value(tensor.shape, descends)) for tensor in outs]
            self.tape.calls.append(Call(func, *given, made, self._inside[-1] if self._inside else ""))
        elif outs and any(tensor.requires_grad for tensor in outs):
            for tensor in outs:
                self._value(tensor)
        for tensor, version in versions:
            if tensor._version != version:
                self._changed(tensor, outs, values)
        return out

    def _changed(self, tensor: Tensor, outs: list[Tensor], values: list[Value]) -> None:
        """Written in place: whatever shares its memory is something else now."""
        own = [self._known[id(tensor)]] if id(tensor) in self._known else []
        fresh, memory = {id(out) for out in outs}, tensor.untyped_storage()._cdata
        for other in self._alive:
            if id(other) not in fresh and other.untyped_storage()._cdata == memory:
                self._stale.setdefault(id(other), []).extend({*own, *values} - {self._known[id(other)]})

    def _note(self, tensor: Tensor, value: Value) -> Value:
        self._known[id(tensor)] = value
        self._stale.pop(id(tensor), None)
        self._alive.append(tensor)
        return value

    def _value(self, tensor: Tensor) -> Value:
        """A tensor's value, also that of one which has come from where nobody could see."""
        if id(tensor) not in self._known:
            before = tuple(value for value in self._known.values() if value.descends)
            value = self._note(tensor, Value(tensor.shape, True))
            self.tape.calls.append(Call(None, before, {}, [value]))
            self.tape.lost.append(self._inside[-1] if self._inside else "the network's own forward")
        if written := self._stale.pop(id(tensor), None):
            before = (self._known[id(tensor)], *written)
            value = self._note(tensor, Value(tensor.shape, any(part.descends for part in before)))
            self.tape.calls.append(Call(None, before, {}, [value], self._inside[-1] if self._inside else ""))
        return self._known[id(tensor)]

    def _written(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if id(part) in self._known:
            return self._known[id(part)]
        return Constant(part.shape) if part.is_floating_point() or isinstance(part, nn.Parameter) else part


def _is_place(tensor: Tensor, index: Any, value: Any) -> bool:
    """Whether a value is the very memory that this index of a tensor names."""
    if not isinstance(value, Tensor):
        return False
    place = tensor[index]
    return place.data_ptr() == value.data_ptr() and (place.shape, place.stride()) == (value.shape, value.stride())


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
