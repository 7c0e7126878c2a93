"""Drive a session from a loop that somebody else wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.training.batches import length
from tost_plugins.training.calling import call
from tost_plugins.training.log import say


class Loops:
    """What a session has for loops that somebody else wrote: `drive` around one, or `begin` ahead of it and `finish` behind."""

    _end: Callable[[], None] | None = None  # of a loop that has begun and not ended

    def begin(
        self: Any,
        optimizer: Any,
        batches: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        *,
        forward: Callable[[Any, Any], Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> Any:
        """`session.begin(optimizer, train_loader, total_steps=...)` ahead of a plain loop, `session.finish()` behind it: from
        here on every step of the optimizer, or of the list of them, keeps the mask and advances the schedules. The arguments
        are those of `start`; `steps_per_epoch` is `len(batches)` where not given and known. `finish` raises TostError if a loop
        that trained took no step of this optimizer. Returns the session.
        """
        self.end_loop()  # one that an error has left, say
        if steps_per_epoch is None:
            steps_per_epoch = length(batches)
        if self.state == "new":
            self.attach()
        times: dict[str, Any] = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        self.start(optimizer, batches, loss_fn=loss_fn, **times, forward=forward, criterion=criterion)
        stop = follow(self)

        def end() -> None:
            stop()
            self.conceal()

        self._end = end
        return self

    @contextmanager
    def drive(
        self: Any,
        optimizer: Any,
        batches: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        *,
        forward: Callable[[Any, Any], Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> Iterator[Any]:
        """`with session.drive(optimizer, train_loader, total_steps=...)`: a plain loop inside trains sparse. On leaving without
        an error the session finishes; after an error or Ctrl-C it stays as it is, so that a checkpoint can still be written.
        The arguments are those of `begin`."""
        how: dict[str, Any] = {"forward": forward, "criterion": criterion}
        self.begin(optimizer, batches, loss_fn, total_steps, steps_per_epoch, **how)
        end, self._end = self._end, None  # a `finish` within is not the loop's end
        try:
            yield self
        finally:
            end()
        if self.state != "finished":  # a finished run may be resumed, or trained on
            check_stepped(self)
            self.finish()

    def end_loop(self: Any) -> bool:
        """Part of `finish`: let the loop that has begun have its optimizer's steps for itself again; whether there was one."""
        end, self._end = self._end, None
        if end is not None:
            end()
        return end is not None


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
    """Raise TostError if weights had gradients, and no step of the session's optimizers has come by; warn if others have trained
    them since the last one, as an optimizer that was made anew in the loop does."""
    if session.run.saved.stepped and session.state == "running" and session.run.goes_on_elsewhere:
        say(
            f"recipe {session.recipe.name}: expected steps of the optimizer that the session was given, got none since step "
            f"{session.clock.step}, where weights trained on: mask and schedules have not followed; for another optimizer begin "
            f"the loop again with it",
            logging.WARNING,
        )
    if session.run.saved.stepped or not session.weights.had_gradients:
        return
    names = ", ".join(type(optimizer).__name__ for optimizer in session.optimizers.outer)
    raise TostError(
        f"drive: expected steps of the optimizer that the session was given, {names}, got none; give it the one that trains "
        f"the model, or a list of several, outside of what is wrapped around it"
    )
