"""Lottery tickets around a training function of one's own: what it is given in each round, and what it must keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins import optimizing, pickles, ranks, rng
from tost_plugins.clock import Clock
from tost_plugins.errors import TostError
from tost_plugins.files import read_json, replacing, write
from tost_plugins.masks import rounds
from tost_plugins.masks.mask import Mask
from tost_plugins.params import prunable, unwrap

if TYPE_CHECKING:
    from tost_plugins.masks.lottery_ticket import LotteryTicket


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
        self._used = False

    def steps(
        self, total: int, optimizer: Optimizer, *others: Any, steps_per_epoch: int | None = None
    ) -> Iterator[int]:
        """The numbers of the steps that are to be done, up to `total`: from 0 in the dense round, and from the moment
        `rewind` in the others, with model, optimizer, `others` and torch's random state as they were then.

        `others` is all else that has a state: learning-rate schedules, a loss scaler. Each turn of the loop is one
        optimizer step; batches that depend on the step's number alone are the same in each round. Gradients are masked
        before the step, weights and optimizer state after it. Raises TostError on an optimizer that lacks weights of
        the model, on `rewind` in epochs without `steps_per_epoch`, and when it is called twice.
        """
        if self._used:
            raise TostError("round.steps: expected one loop in a round, got a second; count all steps in one")
        self._used = True
        params = prunable(unwrap(self.model), self.ticket.ignore)
        inner = optimizing.innermost(optimizer, params)
        first = rounds.first_step(self.ticket.rewind, Clock(0, total, steps_per_epoch))
        masked = [(param, self.mask[name].to(param.device, param.dtype)) for name, param in params.items()]
        parts = (self.model, optimizer, *others)
        step = self._restore(parts)
        optimizing.mask_weights(masked, inner)
        handles = [
            inner.register_step_pre_hook(lambda *_: optimizing.mask_gradients(masked)),
            inner.register_step_post_hook(lambda *_: optimizing.mask_weights(masked, inner)),
        ]
        try:
            while step < total:
                if self.number == 0 and step == first:
                    _save(self._early, parts, step)
                yield step
                step += 1
                if self._save_every and step % self._save_every == 0:
                    _save(self._last, parts, step)
        finally:
            for handle in handles:
                handle.remove()

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
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        rng.restore(saved["rng"])
        return saved["step"]


def run(
    ticket: LotteryTicket,
    model: nn.Module,
    train: Callable[[nn.Module, Round], Mapping[str, float] | None],
    out: Path,
    resume: bool,
    save_every: int | None,
) -> list[rounds.Row]:
    """What `LotteryTicket.run` says."""
    _check(ticket, out, resume)
    bare = unwrap(model)
    params = prunable(bare, ticket.ignore)
    if not (out / "initial.pt").exists():
        _save(out / "initial.pt", (bare,), 0)

    def one(number: int, folder: Path, mask: Mask) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        done, weights = folder / "result.json", folder / "model.pt"
        if not done.exists():
            _begin(bare, out / "initial.pt", mask, params)
            scores = _scores(train(model, Round(ticket, model, number, folder, mask, save_every)))
            _conclude(ticket, out, mask, params)
            _save(weights, (bare,), -1)
            write(done, json.dumps(scores))
        bare.load_state_dict(pickles.load(weights)["parts"][0])
        return params, read_json(done)

    return list(rounds.each(ticket, Mask.dense(params), out, one))


def _check(ticket: LotteryTicket, out: Path, resume: bool) -> None:
    """A folder is for one ticket; it is new, or one goes on with it."""
    path = out / "ticket.json"
    settings = TypeAdapter(type(ticket)).dump_json(ticket, indent=1).decode()
    if ranks.world() > 1:
        raise TostError("LotteryTicket.run: expected one process, got several; call it in one")
    if path.exists() and not resume:
        raise TostError(
            f"LotteryTicket.run: expected a new folder, got {str(out)!r} with rounds in it; pass resume=True"
        )
    if path.exists() and read_json(path) != json.loads(settings):
        raise TostError(
            f"LotteryTicket.run: expected the ticket that {out} was started with, got another one; "
            f"see {path}, or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write(path, settings)


def _begin(model: nn.Module, initial: Path, mask: Mask, params: Mapping[str, nn.Parameter]) -> None:
    """The initial weights and buffers, masked, and the random state that the first round began with."""
    saved = pickles.load(initial)
    model.load_state_dict(saved["parts"][0])
    mask.apply_({name: param.detach() for name, param in params.items()})
    rng.restore(saved["rng"])


def _scores(returned: Any) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in ({} if returned is None else returned).items()}
    except (AttributeError, TypeError, ValueError):
        raise TostError(
            f"expected a dict of numbers or None from the training function, got {returned!r}; "
            f"return {{'accuracy': ...}}"
        ) from None


def _conclude(ticket: LotteryTicket, out: Path, mask: Mask, params: Mapping[str, nn.Parameter]) -> None:
    """Check the promises: zeros outside the mask, and an early state where one is to be rewound to."""
    for name, keep in mask.items():
        if bool(params[name].detach().cpu()[~keep].any()):
            raise TostError(
                f"expected zeros outside the mask after training, got others in {name}; loop over "
                f"round.steps(...), or give round.mask to the session or adapter that trains"
            )
    if ticket.rewind.value and not (out / "early.pt").exists():
        raise TostError(
            f"expected the state at {str(ticket.rewind)!r} to be kept, got none; loop over "
            f"round.steps(...), or use rewind='0ba' or tost lottery"
        )


def _save(path: Path, parts: tuple[Any, ...], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"parts": [part.state_dict() for part in parts], "rng": rng.states(), "step": step}
    with replacing(path) as temporary:
        torch.save(content, temporary)
