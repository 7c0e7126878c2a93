"""Steps of optimizers, seen from outside: which of several have stepped, and what is wrapped around them."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from tost_plugins.errors import TostError

_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # what torch puts around every step
_STATE = "torch.distributed.checkpoint.state_dict"  # steps with zero gradients, to have the optimizer make its state


class Steps:
    """Which of the inner optimizers have stepped, and how many calls of wrappers are still going on.

    `sits_out()` says whether the step at hand is not to be taken at all: the mask moves in its place.
    """

    def __init__(
        self,
        inner: list[Any],
        before: Callable[[bool], None],
        after: Callable[[], None],
        skipped: Callable[[], None],
        sits_out: Callable[[], bool],
    ) -> None:
        self.inner, self.before, self.after, self.skipped, self.sits_out = inner, before, after, skipped, sits_out
        self.done: set[int] = set()
        self.inside: set[int] = set()  # whose step has been seen to begin
        self.depth = 0

    def watch(self, optimizer: Any) -> list[Callable[[], None]]:
        """See an inner optimizer step. Loss scalers may call what its `step` was before; torch's own hooks see that, where
        its class calls torch's constructor."""
        removers = [around(optimizer, "step", functools.partial(self._step, optimizer))]
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):
            removers += [
                optimizer.register_step_pre_hook(self._hooked_begin).remove,
                optimizer.register_step_post_hook(self._hooked_end).remove,
            ]
        return removers

    def within(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A wrapper's call, in which inner optimizers may step."""
        self.depth += 1
        try:
            return step(*args, **kwargs)
        finally:
            self.depth -= 1
            self._settle()

    def _step(self, optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _no_step(optimizer):
            return step(*args, **kwargs)
        args, kwargs = self._begins(optimizer, (optimizer, *args), kwargs) or ((optimizer, *args), kwargs)
        result = None
        if not self.sits_out():
            self.inside.add(id(optimizer))
            try:
                result = step(*args[1:], **kwargs)
            finally:
                self.inside.discard(id(optimizer))
        self._ends(optimizer)
        return result

    def _hooked_begin(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if id(optimizer) not in self.inside and not _no_step(optimizer):
            return self._begins(optimizer, args, kwargs)
        return None

    def _hooked_end(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(optimizer) not in self.inside and not _no_step(optimizer):
            self._ends(optimizer)

    def _begins(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
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
        if torch._C._current_graph_task_id() != -1:
            raise TostError(
                f"step: expected {type(optimizer).__name__}.step() behind the backward pass, got one from within it, by a hook "
                f"of a gradient, where others are not there yet; step after backward()"
            )
        if id(optimizer) in self.done and not self.depth:  # another one sits this step out
            self.done.clear()
            self.after()
        if not self.done:
            self.before(check_finite)

    def _ends(self, optimizer: Any) -> None:
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


def around(holder: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Have `call(method, ...)` stand in for a method of this one object; returns what puts it back."""
    method, own = getattr(holder, name), vars(holder).get(name)

    @functools.wraps(method)
    def stand_in(_: Any, *args: Any, **kwargs: Any) -> Any:
        return call(method, *args, **kwargs) if active else method(*args, **kwargs)

    active, bound = [True], types.MethodType(stand_in, holder)  # bound: torch's schedules look for what is below
    setattr(holder, name, bound)

    def remove() -> None:
        active.clear()  # others, such as a schedule, may have put theirs on top
        if vars(holder).get(name) is bound:
            delattr(holder, name) if own is None else setattr(holder, name, own)

    return remove


def inside(optimizer: Any) -> list[Any]:
    """The optimizers that another one holds, as SAM, Lookahead and Accelerate's do, alone or in a list."""
    found = []
    for value in getattr(optimizer, "__dict__", {}).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [each for each in values if isinstance(each, Optimizer) or _like_one(each)]
    return [each for each in found if each is not optimizer]


def leaves(optimizer: Any) -> list[Any]:
    """Those that take the steps, without what is wrapped around them."""
    held = inside(optimizer)
    return [leaf for each in held for leaf in leaves(each)] if held else [optimizer]


def wrappers(optimizer: Any) -> list[Any]:
    """What is wrapped around them, the outermost first."""
    held = inside(optimizer)
    return [optimizer, *(wrapper for each in held for wrapper in wrappers(each))] if held else []


def _like_one(value: Any) -> bool:
    """Whether it is an optimizer that is none of torch's classes."""
    return hasattr(value, "param_groups") and hasattr(value, "state_dict") and callable(getattr(value, "step", None))
