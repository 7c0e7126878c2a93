"""A mask from lottery tickets: train, prune the smallest weights, rewind the others, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.allocation import allocate, kept_count
from tost_plugins.masks.base import STRICT, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.restart import KeptWeights, restart
from tost_plugins.masks.ticket_scores import TicketScore, ticket_score
from tost_plugins.masks.topk import check_finite, choose, split, tell
from tost_plugins.training.clock import Clock, Time
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task

LEARNING_RATE = "learning_rate"


def _moment(value: object) -> object:
    """A time, or that the weights are kept and the learning rate alone is rewound."""
    if value == LEARNING_RATE:
        return value
    try:
        return Time.parse(value)  # type: ignore[arg-type]
    except TostError as error:
        raise ValueError(str(error)) from None


#: What a round goes back to: a moment of the dense round, or only its learning rate.
Rewind = Annotated[
    Time | Literal["learning_rate"],
    BeforeValidator(_moment),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["0ba", "500ba", "0.05dur", LEARNING_RATE]}),
]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LotteryTicket:
    """Rounds of training: the first is dense, each later one removes `prune` of the surviving weights, those with the
    lowest `score` at the end of the round before, and trains the others again from where they were at `rewind`.

    A recipe with this mask runs with `tost lottery RECIPE`, under any trainer; `tost_plugins.LotteryTicket` also has `run`,
    which does the same around a training function of one's own.

    Fields: `sparsity` of the last round, in [0, 1), 0 is the dense round alone; `prune`, the
    share of the survivors that a round removes, from 0.001 (slow) to below 1 (the last round follows the dense one);
    `rewind`, the moment of the dense round whose weights, buffers (batch norm), optimizer and learning-rate schedule
    each later round starts from, before the run's end, or "learning_rate": the weights and buffers stay what the round
    before has made of them, and the rest starts anew; `score`, what tells a weight's worth from its value v at the
    round's end, and from w, its value before the dense round (`ticket_score` has the formulas): "large_final" is |v|;
    `weights`, what the kept ones start from: "own" values, the own signs with their layer's standard deviation
    ("constant_sign"), each other's values ("reshuffled") or "new" ones, the last three from 0ba alone; `removed`, what the
    others are: "zero", or, within `round.steps` of `run` alone, frozen at their "initial" values; `allocation`, "global"
    compares all layers, "uniform" removes the same share of every layer's survivors; `ignore`, globs of layers to leave
    alone; `on_collapse`, for a layer that loses everything.

    Paper: Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019; rewinding to an early state: Frankle et al.,
    Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020; `score` and `weights`: Zhou et al.,
    Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask, NeurIPS 2019; "learning_rate": Renda, Frankle and
    Carbin, Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020.
    Differs from the paper: exact counts, and the last round has exactly `sparsity`; the output layer is pruned like the
    others (theirs at half the rate). In "large_init_large_final" and its counterpart the scale between initial and final
    weights makes their layer's means equal, where the code of Zhou et al. looks for the one at which equal shares pass.
    "learning_rate" runs the whole schedule again, the paper any part of it; momentum starts anew.

    Example:
        >>> ticket = LotteryTicket(sparsity=0.5)
        >>> [round(sparsity, 3) for sparsity in ticket.sparsities()]
        [0.0, 0.2, 0.36, 0.488, 0.5]
        >>> mask = ticket.next(Mask({"fc": torch.ones(5)}), {"fc": torch.tensor([0.3, -9.0, 0.1, 2.0, -1.0])}, 0.4)
        >>> mask["fc"].tolist()
        [False, True, False, True, True]
    """

    kind: Literal["lottery_ticket"] = "lottery_ticket"
    sparsity: Sparsity
    prune: Annotated[float, Field(ge=0.001, lt=1), NUMBER] = 0.2
    rewind: Rewind = Time(0, "ba")
    score: TicketScore = "large_final"
    weights: KeptWeights = "own"
    removed: Literal["zero", "initial"] = "zero"
    allocation: Literal["global", "uniform"] = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

    @model_validator(mode="after")
    def _from_the_start(self) -> LotteryTicket:
        if self.weights != "own" and self.first_step(Clock(0, 1000, 10)):
            raise ValueError(f"expected rewind: 0ba beside weights: {self.weights}, got {self.rewind}; leave one out")
        if self.weights != "own" and self.keeps_weights:
            raise ValueError(f"expected weights: own beside rewind: learning_rate, got {self.weights}; leave one out")
        return self

    @property
    def keeps_weights(self) -> bool:
        """Whether a round goes on with the weights of the one before: nothing but the learning rate is rewound."""
        return not isinstance(self.rewind, Time)

    def first_step(self, clock: Clock) -> int:
        """The optimizer step that rounds are rewound to."""
        return self.rewind.steps(clock) if isinstance(self.rewind, Time) else 0

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """Raises TostError: this mask is not found before training, but by several trainings."""
        raise single_run()

    def sparsities(self) -> list[float]:
        """That of each round: 0, then 1 - (1 - prune) ** round, at last exactly `sparsity`."""
        found = [0.0]
        while found[-1] < self.sparsity:
            reached = 1 - (1 - self.prune) ** len(found)
            found.append(reached if reached < self.sparsity - 1e-9 else self.sparsity)
        return found

    def next(
        self,
        mask: Mask,
        weights: Mapping[str, Tensor],
        sparsity: float,
        initial: Mapping[str, Tensor] | None = None,
    ) -> Mask:
        """Of the weights that `mask` keeps those with the highest `score`, round((1 - sparsity) * N) in all; none returns.

        `weights` are those at the end of a round, `initial` those before the first one, for a score that asks for them.
        Ties go to the lower index, layers in their order. Raises TostError on weights that are not finite, and where more
        are asked for than survive. Whether the mask connects is looked at by the session that trains with it.
        """
        if initial is None and self.score not in ("large_final", "small_final"):
            raise TostError(f"expected the initial weights for score {self.score!r}, got none; pass initial=...")
        count = self._counts(mask, sparsity)
        alive = torch.cat([keep.flatten() for keep in mask.values()])
        scores = [self._scores(keep, weights[name], (initial or weights)[name]) for name, keep in mask.items()]
        flat = torch.cat(scores).masked_fill(~alive, 0)
        check_finite(flat, mask)
        least = flat.min() if alive.any() else 0.0
        kept, lost = choose(mask, flat.masked_fill(~alive, float(least - abs(least) - 1)), count, self.on_collapse)
        tell(lost)
        return Mask(split(kept, mask))

    def _scores(self, keep: Tensor, final: Tensor, initial: Tensor) -> Tensor:
        return ticket_score(self.score, initial.detach().cpu(), final.detach().cpu(), keep).flatten()

    def restart(self, weights: Mapping[str, Tensor], mask: Mask, generator: torch.Generator) -> None:
        """Write into the initial weights what a round starts from with them, as `weights` says; the mask is not applied."""
        restart(self.weights, {name: weight.detach() for name, weight in weights.items()}, mask, generator)

    def _counts(self, mask: Mask, sparsity: float) -> dict[str, int] | int:
        alive, total = {name: int(keep.sum()) for name, keep in mask.items()}, kept_count(sparsity, mask.size)
        if total > mask.kept:
            raise TostError(
                f"expected a sparsity of at least {mask.sparsity:g}, got {sparsity:g}; pruned weights stay so"
            )
        shares = allocate(self.allocation, {name: (count,) for name, count in alive.items()}, 1 - total / mask.kept)
        return total if shares is None else shares


def single_run() -> TostError:
    """What is wrong with training such a recipe once."""
    return TostError(
        "expected several rounds of training, got a single run; find the masks with 'tost lottery RECIPE' or "
        "LotteryTicket(...).run(...), and train with one of them as mask: {kind: file, path: .../mask.safetensors}"
    )
