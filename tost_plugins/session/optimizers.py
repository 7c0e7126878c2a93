"""The optimizers that train a network, each with what is wrapped around it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.session.optimizer_state import numbers, start_values
from tost_plugins.training.finite import all_finite, not_finite
from tost_plugins.training.log import say
from tost_plugins.training.params import some
from tost_plugins.training.sharding import any_rank, local

_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # what torch puts around every step
_STATE = "torch.distributed.checkpoint.state_dict"  # steps with zero gradients, to have the optimizer make its state
_STEPS = ("step", "first_step", "second_step")  # of wrappers: the last two are those of SAM in its usual form

Parameters = Mapping[str, nn.Parameter]


class Optimizers:
    """One optimizer or several for one network (Muon for matrices, AdamW for the rest), as they were given: `outer`, and
    `inner`, those that take the steps, without what is wrapped around them (Accelerate's, Lookahead, SAM).

    Raises TostError unless together they train all of `weights` that require grad.
    """

    def __init__(self, given: Any, weights: Parameters) -> None:
        self.outer: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        self.inner: list[Any] = list(dict.fromkeys(leaf for each in self.outer for leaf in _leaves(each)))
        self._starts: dict[tuple[int, int], dict[str, float]] = {}  # of their state, as far as they were looked for
        self._unknown: set[str] = set()  # those that cannot be told, already said
        held = {id(param) for group in self.groups() for param in group["params"]}
        missing = [name for name, param in weights.items() if param.requires_grad and id(param) not in held]
        if missing:
            raise TostError(
                f"optimizer: expected one that trains every prunable weight of the model, got one without {some(missing)}; "
                f"make it from model.parameters() of this very model, give a list where several optimizers train it, or "
                f"`ignore` what none of them trains"
            )

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of them all."""
        return (group for optimizer in self.inner for group in optimizer.param_groups)

    def join(self, companions: Iterable[tuple[nn.Parameter, nn.Parameter]], model: nn.Module) -> None:
        """Put each added parameter into the group of the parameter beside it, where none of them has it, and its name where
        an optimizer was made from named parameters."""
        group_of = {id(param): group for group in self.groups() for param in group["params"]}
        names = {id(param): name for name, param in model.named_parameters()}
        for param, beside in companions:
            if id(param) not in group_of and id(beside) in group_of:
                group_of[id(beside)]["params"].append(param)
                if "param_names" in group_of[id(beside)]:
                    group_of[id(beside)]["param_names"].append(names[id(param)])

    def leave(self, params: Iterable[nn.Parameter]) -> None:
        """Take parameters out of their groups, and their state with them."""
        gone = {id(param) for param in params}
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                stay = [id(param) not in gone for param in group["params"]]
                for param in compress(group["params"], [not here for here in stay]):
                    optimizer.state.pop(param, None)
                for key in {"params", "param_names"} & group.keys():
                    group[key] = list(compress(group[key], stay))

    def not_finite(self, model: nn.Module) -> list[str]:
        """The names of parameters whose gradients hold NaN or Inf; where ranks hold parts, a rank that has none itself
        names the others."""
        grads = [p.grad for group in self.groups() for p in group["params"] if p.grad is not None]
        if not grads or not any_rank(not all_finite(grads), grads[0]):
            return []
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return not_finite(named) or ["the parts of other ranks"]

    def drop_gradients(self) -> None:
        """Make the step that follows change nothing: optimizers pass over parameters without a gradient."""
        for group in self.groups():
            for param in group["params"]:
                param.grad = None

    # ---- state

    def remember(self, weight: nn.Parameter) -> bool:
        """Whether any of them keeps numbers of this weight."""
        return any(weight in optimizer.state for optimizer in self.inner)

    @torch.no_grad()
    def renew(self, weight: nn.Parameter, changed: Tensor, idle: Tensor) -> None:
        """Give the entries `changed` of a weight the state that a new weight has; `idle` are entries that stay
        removed; both as bools over the part of the weight that this rank holds.

        Where a start value cannot be found out, all idle entries hold the same number, and that is it; else what the
        optimizer remembers is left, which is said once.
        """
        for optimizer in self.inner:
            for key, value in numbers(weight, optimizer.state.get(weight)):
                starts = self._starts.setdefault((id(optimizer), weight.ndim), {})
                if not starts:
                    starts.update(start_values(optimizer, weight))
                seen = local(value)[idle]
                if key in starts or (seen.numel() and bool((seen == seen[0]).all())):
                    local(value).masked_fill_(changed, starts[key] if key in starts else seen[0].item())
                elif key not in self._unknown:
                    self._unknown.add(key)
                    say(
                        f"{type(optimizer).__name__}: what {key!r} holds for a single weight cannot be told and is left "
                        f"as it is; weights that come back start with what it remembers"
                    )

    # ---- steps

    def follow(
        self, before: Callable[[bool], None], after: Callable[[], None], skipped: Callable[[], None]
    ) -> Callable[[], None]:
        """Make every step one of the session's; returns what takes the hooks away.

        `before(check_finite)` comes with the gradients of a step, after its closure if there is one (each time that the
        optimizer calls it); `after()` when the outermost call that a step was part of is over: wrappers write weights after
        the inner step. Several optimizers make one step together. `skipped()` comes after a step that a fused optimizer has
        skipped by itself; those that gradient accumulation or a loss scaler leaves out need no care.
        """
        steps = _Steps(self.inner, before, after, skipped)
        removers = [remove for leaf in self.inner for remove in steps.watch(leaf)]
        wrappers = [each for outer in self.outer for each in _wrappers(outer)]
        removers += [
            _around(wrapper, name, steps.within)
            for wrapper in dict.fromkeys(wrappers)
            for name in _STEPS
            if callable(getattr(wrapper, name, None))
        ]

        def remove() -> None:
            for each in removers:
                each()

        return remove


class _Steps:
    """Which of the inner optimizers have stepped, and how many calls of wrappers are still going on."""

    def __init__(self, inner: list[Any], before: Callable, after: Callable, skipped: Callable) -> None:
        self.inner, self.before, self.after, self.skipped = inner, before, after, skipped
        self.done: set[int] = set()
        self.depth = 0

    def watch(self, optimizer: Any) -> list[Callable[[], None]]:
        """See an inner optimizer step; torch's own hooks are there if its class calls torch's constructor."""
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            return [_around(optimizer, "step", functools.partial(self._step, optimizer))]
        return [
            optimizer.register_step_pre_hook(self._begins).remove,
            optimizer.register_step_post_hook(self._ends).remove,
        ]

    def within(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A wrapper's call, in which inner optimizers may step."""
        self.depth += 1
        try:
            return step(*args, **kwargs)
        finally:
            self.depth -= 1
            self._settle()

    def _step(self, optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._begins(optimizer, (optimizer, *args), kwargs) or ((optimizer, *args), kwargs)
        result = step(*args[1:], **kwargs)
        self._ends(optimizer, args, kwargs)
        return result

    def _begins(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if _no_step(optimizer):
            return None
        # a fused optimizer gets scaled gradients, and skips by itself a step in which they overflow
        check_finite = getattr(optimizer, "found_inf", None) is None
        _, closure, *_ = *args, kwargs.get("closure"), None  # the optimizer itself comes first
        if closure is None:
            return self._ready(optimizer, check_finite)

        def gradients() -> Any:
            loss = closure()
            self._ready(optimizer, check_finite)
            return loss

        return args[:1], {**kwargs, "closure": gradients}

    def _ready(self, optimizer: Any, check_finite: bool) -> None:
        if id(optimizer) in self.done and not self.depth:  # another one sits this step out
            self.done.clear()
            self.after()
        if not self.done:
            self.before(check_finite)

    def _ends(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if _no_step(optimizer):
            return
        if getattr(optimizer, "found_inf", None):
            self.skipped()
        else:
            self.done.add(id(optimizer))
            self._settle()

    def _settle(self) -> None:
        if not self.depth and len(self.done) == len(self.inner):
            self.done.clear()
            self.after()


def _no_step(optimizer: Optimizer) -> bool:
    """Whether this hook's step trains nothing by itself: a class whose step calls its parent's may have torch see two, and
    `get_state_dict` and `set_state_dict` of torch.distributed.checkpoint take a step of an optimizer without state."""
    frame, steps = sys._getframe(1), 0
    while frame is not None:
        if frame.f_globals.get("__name__") == _STATE:
            return True
        steps += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _around(holder: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Have `call(method, ...)` stand in for a method of this one object; returns what puts it back."""
    method, own = getattr(holder, name), vars(holder).get(name)

    @functools.wraps(method)
    def around(*args: Any, **kwargs: Any) -> Any:
        return call(method, *args, **kwargs) if active else method(*args, **kwargs)

    active = [True]
    setattr(holder, name, around)

    def remove() -> None:
        active.clear()  # others, such as a schedule, may have put theirs on top
        if vars(holder).get(name) is around:
            delattr(holder, name) if own is None else setattr(holder, name, own)

    return remove


def _inside(optimizer: Any) -> list[Any]:
    """The optimizers that another one holds, as SAM, Lookahead and Accelerate's do, alone or in a list."""
    found = []
    for value in getattr(optimizer, "__dict__", {}).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [each for each in values if isinstance(each, Optimizer) or _like_one(each)]
    return [each for each in found if each is not optimizer]


def _like_one(value: Any) -> bool:
    """Whether it is an optimizer that is none of torch's classes."""
    return hasattr(value, "param_groups") and hasattr(value, "state_dict") and callable(getattr(value, "step", None))


def _leaves(optimizer: Any) -> list[Any]:
    inside = _inside(optimizer)
    return [leaf for each in inside for leaf in _leaves(each)] if inside else [optimizer]


def _wrappers(optimizer: Any) -> list[Any]:
    inside = _inside(optimizer)
    return [optimizer, *(wrapper for each in inside for wrapper in _wrappers(each))] if inside else []
