"""Drive a Session from a loop that somebody else wrote, through the optimizer's own step hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tost_plugins.training.batches import length

_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # what torch puts around every step
_STATE = "torch.distributed.checkpoint.state_dict"  # steps with zero gradients, to have the optimizer make its state


def hook(session: Any) -> Callable[[], None]:
    """Make every step of the session's (started) optimizer a step of the session; returns what removes the hooks.

    The hooks sit on the innermost torch optimizer, so wrappers, gradient accumulation and steps that a loss scaler
    skips need no care. With `optimizer.step(closure)` the closure is followed by the session's `before_step`, each time
    that the optimizer calls it.
    """
    optimizer = session.optimizer
    assert optimizer is not None, "hook() comes after start()"

    def before(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if _no_step(optimizer):
            return None
        # a fused optimizer gets scaled gradients, and skips by itself a step in which they overflow
        check_finite = getattr(optimizer, "found_inf", None) is None
        _, closure, *_ = *args, kwargs.get("closure"), None  # the optimizer itself comes first
        if closure is None:
            return session.before_step(check_finite)

        def gradients() -> Any:
            loss = closure()
            session.before_step(check_finite)
            return loss

        return args[:1], {**kwargs, "closure": gradients}

    def after(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if _no_step(optimizer):
            return
        skipped = bool(getattr(optimizer, "found_inf", None))
        session.conceal() if skipped else session.after_step()

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


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


@contextmanager
def drive(
    session: Any,
    optimizer: Optimizer,
    batches: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    **how: Any,
) -> Iterator[Any]:
    """Within: every `optimizer.step()` keeps the mask and advances the schedules. On leaving without an error the
    session finishes; after an error or Ctrl-C it stays as it is, so that a checkpoint can still be written.

    `steps_per_epoch` is `len(batches)` where not given and known; `how` is what else `start` takes.
    """
    if steps_per_epoch is None:
        steps_per_epoch = length(batches)
    if session.state == "new":
        session.attach()
    session.start(optimizer, batches, loss_fn=loss_fn, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **how)
    remove = hook(session)
    try:
        yield session
    finally:
        remove()
        session.release()
        session.conceal()
    if session.state != "finished":  # a finished run may be resumed, or trained on
        session.finish()
