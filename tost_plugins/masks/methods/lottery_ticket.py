"""A mask from lottery tickets: train, prune the smallest weights, rewind the others, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.allocation import allocate, kept_count
from tost_plugins.masks.base import STRICT, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import choose, split, tell
from tost_plugins.training.clock import Time, TimeField
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LotteryTicket:
    """Rounds of training: the first is dense, each later one removes `prune` of the surviving weights, those with the
    smallest |w| at the end of the round before, and trains the others again from where they were at `rewind`.

    A recipe with this mask runs with `tost lottery RECIPE`, under any trainer; `tost_plugins.LotteryTicket` also has `run`,
    which does the same around a training function of one's own.

    Fields: `sparsity` of the last round, in [0, 1), 0 is the dense round alone; `prune`, the
    share of the survivors that a round removes, from 0.001 (slow) to below 1 (the last round follows the dense one);
    `rewind`, the moment of the dense round whose weights, buffers (batch norm), optimizer and learning-rate schedule
    each later round starts from, before the run's end; `allocation`, "global" compares all layers, "uniform" removes
    the same share of every layer's survivors; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer
    that loses everything.

    Paper: Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019; rewinding to an early state: Frankle et al.,
    Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020.
    Differs from the paper: exact counts, and the last round has exactly `sparsity`; the output layer is pruned like the
    others (theirs at half the rate).

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
    prune: Annotated[float, Field(ge=0.001, lt=1)] = 0.2
    rewind: TimeField = Time(0, "ba")
    allocation: Literal["global", "uniform"] = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

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

    def next(self, mask: Mask, weights: Mapping[str, Tensor], sparsity: float) -> Mask:
        """Of the weights that `mask` keeps the largest |w|, round((1 - sparsity) * N) in all; none returns.

        Ties go to the lower index, layers in their order. Raises TostError on weights that are not finite, and where more
        are asked for than survive. Whether the mask connects is looked at by the session that trains with it.
        """
        count = self._counts(mask, sparsity)
        alive = torch.cat([keep.flatten() for keep in mask.values()])
        sizes = torch.cat([wide(weights[name].detach().cpu()).abs().flatten() for name in mask])
        kept, lost = choose(mask, sizes.masked_fill(~alive, -1), count, self.on_collapse)
        tell(lost)
        return Mask(split(kept, mask))

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
