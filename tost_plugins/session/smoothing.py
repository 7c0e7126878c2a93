"""The recipe's label smoothing at work: whether the loss at hand is the training loss, and whether anything was smoothed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.calling import check_callable, cross_entropy
from tost_plugins.training.log import say
from tost_plugins.tweaks.label_smoothing import LabelSmoothing, Twins, check_hard


class Smoothing:
    """What a session smooths its training loss with. A copy or a pickle of it leads to no session, and smooths nothing."""

    def __init__(self, session: Any = None) -> None:
        self.session = session
        self.seen = False  # whether a training loss has been smoothed since start
        self.in_eval = False  # whether one came by while the model was in eval mode
        self.passed = False  # whether a batch without a loss came by
        self.remedy = "make the training loss with session.criterion(loss_fn)"
        self._twins: Twins | None = None  # what the last forward pass has made, where it is followed
        self._within = False  # whether a loss is being computed
        self._losses: list[Callable[..., Any]] = []  # those that were made before the start

    def __reduce__(self) -> tuple:
        return Smoothing, ()

    @property
    def tweak(self) -> LabelSmoothing | None:
        """The recipe's label smoothing, if it has any and it is not left out."""
        tweaks = () if self.session is None else self.session.tweaks
        found = [tweak for tweak in tweaks if isinstance(tweak, LabelSmoothing)]
        return found[0] if found else None

    def criterion(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """`loss_fn` with smoothed labels in training: a module; or `loss_fn` itself where the recipe does not smooth. Whether one
        that smooths by its own settings is in the way of a tweak that may rest turns out with its first loss."""
        check_callable(optional=False, loss_fn=loss_fn)
        if self.session.state in ("new", "attached"):
            self._losses.append(loss_fn)
        if self.tweak is not None and (self.session.state == "running" or not self.tweak.least_steps):
            try:
                check_hard("label_smoothing", loss_fn)
            except TostError as error:
                self.leave_out(error, "the loss smooths labels itself")
        return loss_fn if self.tweak is None else SmoothedLoss(loss_fn, self)

    @property
    def known(self) -> Callable[..., Any] | None:
        """The training loss for masks that look at one, where `criterion` was given it before the start, once: cross entropy
        with its settings. Another loss may be called in any way."""
        loss_fn = self._losses[0] if len(self._losses) == 1 else None
        fits = isinstance(loss_fn, nn.CrossEntropyLoss) and loss_fn.reduction != "none"
        fits = fits or loss_fn is nn.functional.cross_entropy
        return partial(cross_entropy, function=loss_fn) if loss_fn is not None and fits else None

    def around(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`compute(*args, **kwargs)`, which returns the loss, alone or in a tuple, list or dict: smoothed while the model trains;
        None, for a batch without a loss, stays None.
        Raises TostError where smoothing is required and the loss is none that it can act on."""
        tweak = self._now()
        if tweak is None:
            self.in_eval = self.in_eval or (torch.is_grad_enabled() and not self._within and self._evaluates())
            return compute(*args, **kwargs)
        twins, self._within = self._twins or Twins(tweak.alpha), True
        try:
            with twins:
                result = compute(*args, **kwargs)
        finally:
            self._within = False
        if result is None:  # Lightning's way to leave a batch out
            self.passed = True
            return None
        try:
            smoothed = twins.of(result)
        except Inapplicable as reason:
            self._unfit(str(reason), "use cross entropy on class indices")
            return result
        self.seen = True
        return smoothed

    def before_forward(self, *_: Any) -> None:
        """A forward pre-hook, where the model may compute the loss that `around` is to return later."""
        tweak = self._now()
        if tweak is not None:
            self._twins, self._within = Twins(tweak.alpha), True
            self._twins.__enter__()

    def after_forward(self, *_: Any) -> None:
        """The forward hook to it, to be registered with `always_call`."""
        if self._within and self._twins is not None:
            self._within = False
            self._twins.__exit__(None, None, None)

    def check(self) -> None:
        """By a session's first step some training loss has been smoothed; else leave smoothing out, or raise TostError."""
        if not self.seen and not self.passed and not self.session.run.saved.stepped and self.tweak is not None:
            if self.in_eval and self._evaluates():  # still
                self._unfit(
                    "came by while the model was in eval mode", "call model.train(), after which norms may eval()"
                )
            else:
                self._unfit("never came by", self.remedy)

    def leave_out(self, error: TostError, why: str) -> None:
        """Raise the error, or go on without smoothing where that is optional: in one line, and `why` in the report."""
        tweak = self.tweak
        assert tweak is not None, "only what is there can be left out"
        if not tweak.optional:
            raise error
        say(str(error), logging.WARNING)
        self.session.tweaks.leave_out(tweak, why)

    def _now(self) -> LabelSmoothing | None:
        """What to smooth with if the loss at hand is a training loss, and no part of one that is being smoothed."""
        session = self.session
        if self._within or session is None or session.state != "running" or not session.model.training:
            return None
        return self.tweak if torch.is_grad_enabled() else None

    def _evaluates(self) -> bool:
        return self.session is not None and self.session.state == "running" and not self.session.model.training

    def _unfit(self, what: str, remedy: str) -> None:
        error = TostError(
            f"label_smoothing: expected a training loss that it can act on, got one that {what}; "
            f"{remedy}, or leave label_smoothing out of the tweaks"
        )
        self.leave_out(error, f"the loss {what}")


class SmoothedLoss(nn.Module):
    """A loss with smoothed labels while its session's model trains, else the loss as it is; so are its copies."""

    def __init__(self, loss_fn: Callable[..., Any], smoothing: Smoothing) -> None:
        super().__init__()
        self.loss_fn, self.smoothing = loss_fn, smoothing

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, smoothed where that is right."""
        return self.smoothing.around(self.loss_fn, *args, **kwargs)
