"""Lottery tickets around a training function of one's own: what it is given in each round, and what it must keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.atomic import replacing
from tost_plugins.files.tensors import by_clean_name
from tost_plugins.lottery import rounds
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training import rng
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable, unwrap


class Round:
    """One round of `LotteryTicket.run`, for its training function: `number` (0 is the dense one) and `mask`.

    The loop that trains runs over `steps`: it rewinds, and keeps the mask. A trainer of a framework takes the mask
    instead (`TostAlgorithm(recipe, mask=round.mask)`, TostCallback, TostHook, or a Session): made anew in each round it
    starts from the initial weights with a fresh optimizer and schedule. Rewinding to a later moment needs `steps`, or
    `tost lottery`, which does it under every trainer.
    """

    def __init__(
        self, ticket: LotteryTicket, model: nn.Module, number: int, folder: Path, mask: Mask, save_every: int | None
    ) -> None:
        self.ticket, self.model, self.number, self.mask = ticket, model, number, mask
        self._early, self._last, self._save_every = folder.parent / "early.pt", folder / "last.pt", save_every
        self._goes_on = ticket.weights != "own" or ticket.keeps_weights  # with the weights that the model has already
        self._used = False

    def steps(
        self, total: int, optimizer: Optimizer, *others: Any, steps_per_epoch: int | None = None
    ) -> Iterator[int]:
        """The numbers of the steps that are to be done, up to `total`: from 0 in the dense round, and from the moment
        `rewind` in the others, with model, optimizer, `others` and torch's random state as they were then.

        `others` is all else that has a state: learning-rate schedules, a loss scaler. Each turn of the loop is one
        optimizer step; batches that depend on the step's number alone are the same in each round. With rewind
        "learning_rate" all but the model is as it was at step 0. Gradients are masked
        before the step, weights and optimizer state after it. Raises TostError on an optimizer that lacks weights of
        the model, on `rewind` in epochs without `steps_per_epoch`, and when it is called twice.
        """
        if self._used:
            raise TostError("round.steps: expected one loop in a round, got a second; count all steps in one")
        self._used = True
        params = prunable(unwrap(self.model), self.ticket.ignore)
        optimizers = Optimizers(optimizer, params)
        weights = MaskedWeights(params, self.mask, self._frozen())
        first = rounds.first_step(self.ticket, Clock(0, total, steps_per_epoch))
        parts = (self.model, optimizer, *others)
        step = self._restore(parts)
        weights.zero()
        weights.forget(optimizers)
        weights.follow()
        stop = optimizers.follow(lambda _: weights.before_step(), weights.zero, weights.zero)
        try:
            while step < total:
                if self.number == 0 and step == first:
                    save(self._early, parts, step)
                yield step
                step += 1
                if self._save_every and step % self._save_every == 0:
                    save(self._last, parts, step)
        finally:
            stop()
            weights.release()

    def _frozen(self) -> dict[str, Tensor] | None:
        """What removed weights are where that is not 0: their initial values."""
        if self.ticket.removed == "zero":
            return None
        initial = first_weights(self._early.parent / "initial.pt")
        return {name: initial[name].masked_fill(keep, 0) for name, keep in self.mask.items()}

    def _restore(self, parts: tuple[Any, ...]) -> int:
        """Go back to this round's last checkpoint, or to the dense round's early state; 0 where there is neither."""
        candidates = (self._last, self._early) if self.number else (self._last,)
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            return 0
        saved = pickles.load(path)
        if len(saved["parts"]) != len(parts):
            raise TostError(
                f"round.steps: expected the {len(saved['parts'])} parts with a state that the dense round had, got "
                f"{len(parts)}; give optimizer and schedules in every round alike"
            )
        states = list(zip(parts, saved["parts"], strict=True))
        for part, state in states[1:] if path == self._early and self._goes_on else states:
            part.load_state_dict(state)
        rng.restore(saved["rng"])
        return saved["step"]


def first_weights(path: Path) -> dict[str, Tensor]:
    """Name -> weight, from what `save` has written of a model before the dense round."""
    return by_clean_name(pickles.load(path)["parts"][0])


def save(path: Path, parts: tuple[Any, ...], step: int) -> None:
    """Write the state of all parts, the random generators and the step, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"parts": [part.state_dict() for part in parts], "rng": rng.states(), "step": step}
    with replacing(path) as temporary:
        torch.save(content, temporary)
