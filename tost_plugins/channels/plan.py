"""Which channels each module of a network has to compute: those that carry a path, and those that belong together with one.

The forward pass is walked along once more. A value has an axis along which its channels lie; a module starts new channels,
what comes between two modules hands them on, joins them, or, where it cannot be told what it does with them, keeps them all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tost_plugins.channels.atoms import Atoms
from tost_plugins.channels.moves import Channels, moved
from tost_plugins.masks.paths.follow import Call, Constant, Tape, Value
from tost_plugins.masks.paths.reach import Reach
from tost_plugins.training.params import clean_name, plain_modules
from tost_plugins.training.transformed import transforms
from tost_plugins.tweaks.surgery.swap import original_class

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Functions that sum or pick over dimensions, or over places of an image.
_OVER_DIMENSIONS = ("sum", "mean", "nansum")
_OVER_PLACES = ("avg_pool", "interpolate", "upsample")


@dataclass(frozen=True)
class Part:
    """What a module computes: the places of its input's and its output's channels, None for all of them. `fill` is what a norm
    gets in the channels that are left out: a number or a bias, None where that is not known."""

    inputs: np.ndarray | None
    outputs: np.ndarray | None
    groups: int = 1
    fill: Tensor | float | None = None


@dataclass
class Plan:
    """Path of a module -> the part that it computes, for all that leave something out; `whole`: what keeps channels that no
    path reaches, and how many."""

    parts: dict[str, Part] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)


#: The channels of each result of a call, None for one of which nothing is left out; None where nobody knows.
_Found = Sequence[Channels | None] | None


class Planner:
    """Walks along a tape; `plan` is the result."""

    def __init__(self, model: nn.Module, tape: Tape, live: Mapping[str, Tensor]) -> None:
        self.tape, self.atoms = tape, Atoms()
        self.modules = {clean_name(path): module for path, module in plain_modules(model)}
        self.of: dict[Value, Channels | None] = dict.fromkeys(tape.inputs)
        self.users: dict[Value, set[str]] = defaultdict(set)  # weight -> the modules that compute with it
        for call in tape.calls:
            for value in call.ins:
                self.users[value].add(call.module if call.kind == "layer" else "")
        self.called: dict[str, list[tuple[Channels | None, Channels | None]]] = {}
        self.made: dict[Value, str] = {}  # by which convolution
        self.fills: dict[str, str] = {}  # norm -> the convolution in front of it
        self.why: dict[int, str] = {}  # atom that is pinned -> the module that pins it
        for call in tape.calls:
            self._walk(call)
        for value in (*tape.outputs, *tape.seen):
            self._keep(value, "outputs")
        self.whole = self._keep_reached(Reach(tape, live))

    # ---- along the tape

    def _walk(self, call: Call) -> None:
        ins = [value for value in call.ins if value.descends]
        if not call.outs or not call.outs[0].descends:
            return
        found = self._result(call, ins)
        if found is None:  # nobody knows what becomes of the channels
            for value in ins:
                self._keep(value, f"{call.name} in {call.module or 'the network itself'}")
            found = [None] * len(call.outs)
        self.of |= dict(zip(call.outs, found, strict=True))

    def _result(self, call: Call, ins: list[Value]) -> _Found:
        module = self.modules.get(call.module)
        if call.kind == "layer" and module is not None:
            return self._layer(call, module, ins)
        if call.name == "batch_norm" and module is not None:
            return self._norm(call, module, ins)
        if all(self.of[value] is None for value in ins):
            return [None] * len(call.outs)
        if call.kind == "each":
            return self._each(call, ins)
        over_places = call.kind == "pool" or any(part in call.name for part in _OVER_PLACES)
        if over_places or call.kind == "largest" or call.name in _OVER_DIMENSIONS:
            return self._reduced(call, ins)
        return self._moved(call, ins) if call.kind == "shape" else None

    def _layer(self, call: Call, module: nn.Module, ins: list[Value]) -> _Found:
        """A convolution or a linear layer of torch's own, called as torch does: it starts new channels."""
        source, out, own = ins[0], call.outs[0], original_class(module)
        weight = next((value for value in call.ins if value.weight), None)
        if own not in (*CONVOLUTIONS, nn.Linear) or transforms(module) or len(ins) != 1 or call.args[0] is not source:
            return None
        if weight is not None and self.users[weight] != {call.module}:
            return None  # it is another layer's too
        axis = len(out.shape) - (1 if own is nn.Linear else len(module.kernel_size) + 1)  # type: ignore[arg-type]
        count, groups = out.shape[axis], getattr(module, "groups", 1)
        inside = self._along(source, axis)
        if groups > 1:
            if inside is None or groups != source.shape[axis] or weight is None:
                return None
            made = self.atoms.new(count)
            self.atoms.join(made, np.repeat(inside.ids, count // groups))
        else:
            if weight is None:  # without a mask it may read what is constant
                self._keep(source, f"{call.module}, which has no mask")
            made = self.atoms.new(count)
        result = Channels(axis, made)
        self._note(call.module, inside, result)
        self.made[out] = call.module
        return [result]

    def _norm(self, call: Call, module: nn.Module, ins: list[Value]) -> _Found:
        if not isinstance(module, NORMS) or len(ins) != 1:
            return None
        inside = self._along(ins[0], 1)
        if inside is not None and ins[0] in self.made:
            self.fills[call.module] = self.made[ins[0]]
        self._note(call.module, inside, inside)
        return [inside]

    def _note(self, path: str, inside: Channels | None, outside: Channels | None) -> None:
        """A module that is called twice has the same channels twice."""
        for before in self.called.setdefault(path, [])[:1]:
            for own, other in zip((inside, outside), before, strict=True):
                if own is not None and other is not None and len(own.ids) == len(other.ids):
                    self.atoms.join(own.ids, other.ids)
                else:
                    for channels in (own, other):
                        if channels is not None:
                            self.atoms.pin(channels.ids)
        self.called[path].append((inside, outside))

    def _each(self, call: Call, ins: list[Value]) -> _Found:
        """Number by number: what is added lies along one axis and has one class."""
        shape = call.outs[0].shape
        known = [(value, found) for value in ins if (found := self.of[value]) is not None]
        axes = {found.axis - len(value.shape) for value, found in known}
        if len(axes) != 1 or len(shape) < -min(axes) or any(out.shape != shape for out in call.outs):
            return None
        back = axes.pop()
        size = shape[back]
        for part in tree_flatten((call.args, call.kwargs))[0]:
            sides = getattr(part, "shape", ())
            wide = len(sides) >= -back and sides[back] > 1
            if isinstance(part, (Constant, Tensor)) and (wide or (call.name == "prelu" and sum(sides) > 1)):
                return None
            if isinstance(part, Value) and self.of.get(part) is None and wide:
                return None  # joins what is whole
        found = [ids.ids for _, ids in known if len(ids.ids) == size]
        if len(found) < len(known) and size > 1:
            return None  # one channel for all
        for other in found[1:]:
            self.atoms.join(found[0], other)
        return [Channels(len(shape) + back, found[0])] * len(call.outs)

    def _reduced(self, call: Call, ins: list[Value]) -> _Found:
        """A sum or a choice over dimensions other than the channels'."""
        if len(ins) != 1 or (inside := self.of[ins[0]]) is None:
            return None
        shape = ins[0].shape
        if call.kind == "largest" or call.name in _OVER_DIMENSIONS:
            given = call.kwargs.get("dim", next((a for a in call.args[1:] if isinstance(a, (int, tuple, list))), None))
            if given is None or isinstance(given, bool):
                return None
            dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
            if inside.axis in dims:
                return None
            gone = [d for d in dims if d < inside.axis] if len(call.outs[0].shape) < len(shape) else []
            return [Channels(inside.axis - len(gone), inside.ids)] * len(call.outs)
        same = (
            len(call.outs[0].shape) == len(shape) and call.outs[0].shape[: inside.axis + 1] == shape[: inside.axis + 1]
        )
        places = inside.axis == 1 or (inside.axis == 0 and len(shape) in (3, 4))
        return [Channels(inside.axis, inside.ids)] * len(call.outs) if same and places else None

    def _moved(self, call: Call, ins: list[Value]) -> _Found:
        """A function that moves numbers, if it does not count on how many channels there are."""
        known = {value: found for value in ins if (found := self.of[value]) is not None}
        return moved(call, known) if len(known) == len(ins) else None

    def _along(self, value: Value, axis: int) -> Channels | None:
        """A value's channels, if they lie along this axis; all are kept if they lie along another one."""
        found = self.of[value]
        if found is not None and (found.axis != axis or len(found.ids) != value.shape[axis]):
            self._keep(value, "another order of dimensions")
            return None
        return found

    # ---- what stays

    def _keep(self, value: Value, why: str) -> None:
        found = self.of.get(value)
        if found is not None:
            for root in np.unique(self.atoms.roots(found.ids)).tolist():
                self.why.setdefault(root, why)
            self.atoms.pin(found.ids)

    def _keep_reached(self, reach: Reach) -> dict[str, int]:
        """Keep what a path reaches; of what is kept without one, by what."""
        kept = {int(root) for root in self.why}
        for value, found in self.of.items():
            if found is not None:
                way = reach[value].detach().movedim(found.axis, 0).unsqueeze(-1).flatten(1)
                reached = way.any(1).cpu().numpy()
                self.atoms.pin(found.ids[reached])
                kept -= set(self.atoms.roots(found.ids[reached]).tolist())
        why = {int(self.atoms.roots(np.array([root]))[0]): reason for root, reason in self.why.items() if root in kept}
        return dict(Counter(why.values()))

    def plan(self) -> Plan:
        """The parts of all modules that can leave something out."""
        made = Plan(whole=self.whole)
        for path, calls in self.called.items():
            inside, outside = (self._places(channels) for channels in calls[0])
            if inside is None and outside is None:
                continue
            module = self.modules[path]
            groups = getattr(module, "groups", 1)
            groups = len(inside) if groups > 1 and inside is not None else groups
            made.parts[path] = Part(inside, outside, groups, self._fill(path))
        return made

    def fill_up(self, channels: Channels | None, together: int) -> None:
        """Keep more channels, until their number is a multiple of this one."""
        while channels is not None and (kept := self.atoms.pinned(channels.ids)).sum() % together and not kept.all():
            self.atoms.pin(channels.ids[~kept][:1])

    def _fill(self, path: str) -> Tensor | float | None:
        """What a norm gets in channels whose filters have lost all weights: the convolution's bias."""
        source = self.fills.get(path)
        if source is None:
            return None
        bias = getattr(self.modules[source], "bias", None)
        return 0.0 if bias is None else bias

    def _places(self, channels: Channels | None) -> np.ndarray | None:
        """Where the channels lie that stay, at least one; None for all."""
        if channels is None:
            return None
        kept = self.atoms.pinned(channels.ids)
        if kept.all():
            return None
        if not kept.any():
            self.atoms.pin(channels.ids[:1])
            kept = self.atoms.pinned(channels.ids)
        return np.flatnonzero(kept)


def plan(model: nn.Module, tape: Tape, live: Mapping[str, Tensor], together: int = 1) -> Plan:
    """What each module has to compute under a mask that keeps live weights only; channels without a path fill up its counts
    to multiples of `together`, as far as that goes."""
    planner = Planner(model, tape, live)
    for calls in planner.called.values():  # a first round, since a part that would be empty keeps one channel
        for channels in calls[0]:
            planner._places(channels)
            planner.fill_up(channels, together)
    return planner.plan()


def not_run(model: nn.Module, tape: Tape) -> list[str]:
    """Modules with parameters of their own, none of which the followed forward pass used: heads for training alone, say."""
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    found = {
        clean_name(path): [names[id(param)] for param in module.parameters(recurse=False)]
        for path, module in plain_modules(model)
    }
    return [path for path, own in found.items() if own and tape.used.isdisjoint(own)]
