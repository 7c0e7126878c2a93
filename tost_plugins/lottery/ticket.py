"""LotteryTicket with `run`: the rounds around a training function of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.atomic import read_json, write
from tost_plugins.lottery import rounds
from tost_plugins.lottery.round import Round, first_weights, save
from tost_plugins.masks.base import STRICT
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods import lottery_ticket
from tost_plugins.training import ranks, rng, seeds
from tost_plugins.training.by_hand import worded
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable, unwrap


@worded
@dataclass(frozen=True, config=STRICT, kw_only=True)
class LotteryTicket(lottery_ticket.LotteryTicket):
    """The mask method `lottery_ticket`, which see for its fields, with `run`: all rounds in one call."""

    def run(
        self,
        model: nn.Module,
        train: Callable[[nn.Module, Round], Mapping[str, float] | None],
        out: str | Path,
        resume: bool = False,
        save_every: int | None = None,
    ) -> list[dict[str, Any]]:
        """All rounds with a training function of one's own; returns a row per round, and leaves the last in `model`.

        `train(model, round)` makes its optimizer and schedule, trains the model inside `round.steps(...)` and returns
        numbers for the table, such as an accuracy, or None. Each call finds the model with its initial weights and
        buffers (with rewind "learning_rate" those that the round before has left; or what `weights` makes of them), masked,
        and torch's random state of the first; see `Round` for what rewinding to a later moment, and
        trainers of a framework, need. `out` gets round-00/mask.safetensors and so on, and lottery.csv, a line per round.

        With `resume` finished rounds are not run again; the one that was killed goes on from its last checkpoint if
        `save_every` (steps) made any, else from its beginning. Raises TostError for a folder that is in use, and when
        the function leaves weights outside its mask.

        Example:
            >>> import tempfile, torch
            >>> net, x = nn.Linear(10, 10), torch.randn(16, 10)
            >>> def train(model, round):
            ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            ...     schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            ...     for step in round.steps(10, optimizer, schedule):
            ...         model(x).square().mean().backward()
            ...         optimizer.step(), schedule.step(), optimizer.zero_grad()
            >>> rows = LotteryTicket(sparsity=0.5, rewind="2ba").run(net, train, tempfile.mkdtemp())
            >>> [row["kept_weights"] for row in rows], int(net.weight.count_nonzero())
            ([100, 80, 64, 51, 50], 50)
        """
        out = Path(out)
        _check(self, out, resume)
        bare = unwrap(model)
        params = prunable(bare, self.ignore)
        if not (out / "initial.pt").exists():
            save(out / "initial.pt", (bare,), 0)

        def one(number: int, folder: Path, mask: Mask) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            done, weights = folder / "result.json", folder / "model.pt"
            if not done.exists():
                _begin(self, bare, out / "initial.pt", number, mask, params)
                scores = _scores(train(model, Round(self, model, number, folder, mask, save_every)))
                _conclude(self, out, mask, params)
                save(weights, (bare,), -1)
                write(done, json.dumps(scores))
            bare.load_state_dict(pickles.load(weights)["parts"][0])
            return params, read_json(done)

        return list(rounds.each(self, Mask.dense(params), out, one, first_weights(out / "initial.pt")))


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


def _begin(
    ticket: LotteryTicket,
    model: nn.Module,
    initial: Path,
    number: int,
    mask: Mask,
    params: Mapping[str, nn.Parameter],
) -> None:
    """The weights and buffers that a round starts from, masked, and the random state that the first round began with."""
    saved = pickles.load(initial)
    if not (number and ticket.keeps_weights):
        model.load_state_dict(saved["parts"][0])
    rng.restore(saved["rng"])
    if number:
        seed = int(torch.randint(2**31, (number + 1,))[-1])  # others in each round, and the same when it runs again
        ticket.restart(params, mask, seeds.generator(seed))
        rng.restore(saved["rng"])
    if ticket.removed == "zero":
        mask.apply_({name: param.detach() for name, param in params.items()})


def _scores(returned: Any) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in ({} if returned is None else returned).items()}
    except (AttributeError, TypeError, ValueError):
        raise TostError(
            f"expected a dict of numbers or None from the training function, got {returned!r}; "
            f"return {{'accuracy': ...}}"
        ) from None


def _conclude(ticket: LotteryTicket, out: Path, mask: Mask, params: Mapping[str, nn.Parameter]) -> None:
    """Check the promises: zeros outside the mask (or initial values), and an early state where one is to be rewound to."""
    zero = ticket.removed == "zero"
    initial = {} if zero else first_weights(out / "initial.pt")
    for name, keep in mask.items():
        removed = params[name].detach().cpu()[~keep]
        if bool(removed.any()) if zero else not torch.equal(removed, initial[name][~keep].to(removed)):
            raise TostError(
                f"expected {'zeros' if zero else 'initial values'} outside the mask after training, got others in {name}; "
                f"loop over round.steps(...), or give round.mask to the session or adapter that trains"
            )
    if ticket.first_step(Clock(0, 1000, 10)) and not (out / "early.pt").exists():
        raise TostError(
            f"expected the state at {str(ticket.rewind)!r} to be kept, got none; loop over "
            f"round.steps(...), or use rewind='0ba' or tost lottery"
        )
