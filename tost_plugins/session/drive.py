"""Drive a session from a loop that somebody else wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.training.batches import length


@contextmanager
def drive(
    session: Any,
    optimizer: Any,
    batches: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    **how: Any,
) -> Iterator[Any]:
    """Within: every step of the optimizer, or of the list of them, keeps the mask and advances the schedules. On leaving
    without an error the session finishes; after an error or Ctrl-C it stays as it is, so that a checkpoint can still be
    written. `steps_per_epoch` is `len(batches)` where not given and known; `how` is what else `start` takes. Raises TostError
    on leaving if a loop that trained took no step of this optimizer.
    """
    if steps_per_epoch is None:
        steps_per_epoch = length(batches)
    if session.state == "new":
        session.attach()
    session.start(optimizer, batches, loss_fn=loss_fn, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **how)
    stop = follow(session)
    try:
        yield session
    finally:
        stop()
        session.conceal()
    if session.state != "finished":  # a finished run may be resumed, or trained on
        check_stepped(session)
        session.finish()


def follow(session: Any, after: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Make every step of a started session's optimizers one of the session's; `after()` comes when it is counted.

    Returns what ends it, and lets gradients be.
    """

    def done() -> None:
        session.after_step()
        after()

    unhook = session.optimizers.follow(session.before_step, done, session.conceal)

    def stop() -> None:
        unhook()
        session.release()

    return stop


def check_stepped(session: Any) -> None:
    """Raise TostError if weights had gradients, and no step of the session's optimizers has come by."""
    if session.run.saved.stepped or not session.weights.had_gradients:
        return
    names = ", ".join(type(optimizer).__name__ for optimizer in session.optimizers.outer)
    raise TostError(
        f"drive: expected steps of the optimizer that the session was given, {names}, got none; give it the one that trains "
        f"the model, or a list of several, outside of what is wrapped around it"
    )
