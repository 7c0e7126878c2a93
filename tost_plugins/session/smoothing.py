"""The session's side of label smoothing: whether the training loss at hand is to be smoothed, and whether it ever came by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.training.log import say
from tost_plugins.tweaks import LabelSmoothing
from tost_plugins.tweaks.label_smoothing import SmoothedLoss


class Smoothing:
    """The label smoothing of a session's recipe, if it has any."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.seen = False  # whether the training loss has been smoothed since start
        self.remedy = "make the training loss with session.criterion(loss_fn)"

    @property
    def tweak(self) -> LabelSmoothing | None:
        """The recipe's settings; None without."""
        return next((tweak for tweak in self.session.tweaks if isinstance(tweak, LabelSmoothing)), None)

    def criterion(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The training loss, with smoothed labels while the model trains."""
        return loss_fn if self.tweak is None else SmoothedLoss(loss_fn, self.tweak.alpha, self.now)

    def now(self) -> bool:
        """Whether the loss of the batch at hand is to be smoothed; asking marks the recipe's smoothing as in use."""
        active = self.session.state == "running" and self.session.model.training
        self.seen = self.seen or active
        return active

    def check(self) -> None:
        """Raise TostError, or say so where it is optional, if a first step comes without a loss that was smoothed."""
        if self.tweak is None or self.seen:
            return
        text = (
            f"label_smoothing: expected a training loss that it can act on, got one that never came by; "
            f"{self.remedy}, or leave label_smoothing out of the tweaks"
        )
        if not self.tweak.optional:
            raise TostError(text)
        say(text, logging.WARNING)
        self.session.tweaks.leave_out(self.tweak, "the loss never came by")
