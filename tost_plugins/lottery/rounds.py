"""The rounds of a lottery ticket: one loop over them, for recipes and for training functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write_csv
from tost_plugins.masks.card import read_card
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.training.clock import Clock

Row = dict[str, Any]

#: What one round is to whoever trains: number, folder and mask -> the trained weights, and numbers for the table.
Train = Callable[[int, Path, Mask], tuple[Mapping[str, Tensor], Mapping[str, Any]]]


def each(
    ticket: LotteryTicket, dense: Mask, out: Path, train: Train, initial: Mapping[str, Tensor] | None = None
) -> Iterator[Row]:
    """Train round after round; yields each one's row, once it is in `out`/lottery.csv. `initial` are the weights before the
    first one, for scores that ask for them.

    Errors say in which round. A round's mask is in its folder before it begins, for whoever looks at a killed one.
    """
    mask, weights, rows = dense, {}, []
    for number, sparsity in enumerate(ticket.sparsities()):
        folder = out / f"round-{number:02d}"
        try:
            mask = ticket.next(mask, weights, sparsity, initial) if number else dense
            path = folder / "mask.safetensors"
            mask.described(**read_card(path, mask)).save(path)  # the card of a round that is done says more
            weights, scores = train(number, folder, mask)
        except TostError as error:
            raise error.at(f"round {number}") from None
        rows.append({"round": number, "sparsity": mask.sparsity, "kept_weights": mask.kept, **scores})
        write_csv(out / "lottery.csv", rows)
        yield rows[-1]


def first_step(ticket: LotteryTicket, clock: Clock) -> int:
    """The optimizer step that rounds are rewound to; raises TostError unless it lies within the run."""
    step = ticket.first_step(clock)
    if clock.total_steps is not None and step >= clock.total_steps:
        raise TostError(
            f"rewind: expected a moment before the end of the run ({clock.total_steps} steps), got {str(ticket.rewind)!r}; "
            f"write an early one, like '0.05dur'"
        )
    return step
