"""A mask from lottery tickets: train, prune the smallest weights, rewind the others, again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.clock import Time, TimeField
from tost_plugins.errors import TostError
from tost_plugins.masks import rewinding
from tost_plugins.masks.allocation import allocate, kept_count
from tost_plugins.masks.base import STRICT, OnCollapse, Sparsity
from tost_plugins.masks.keep import choose, split, tell
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scores import wide
from tost_plugins.params import some
from tost_plugins.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LotteryTicket:
    """Rounds of training: the first is dense, each later one removes `prune` of the surviving weights, those with the
    smallest |w| at the end of the round before, and trains the others again from where they were at `rewind`.

    A recipe with this mask runs with `tost lottery RECIPE`, under any trainer; `run` does the same around a training
    function of one's own. Fields: `sparsity` of the last round, in [0, 1), 0 is the dense round alone; `prune`, the
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

        Ties go to the lower index, layers in their order. Raises TostError on weights that are not finite, on a layer
        that loses them all (unless `on_collapse` is "keep_one"), and where more weights are asked for than survive.
        """
        count = self._counts(mask, sparsity)
        alive = torch.cat([keep.flatten() for keep in mask.values()])
        sizes = torch.cat([wide(weights[name].detach().cpu()).abs().flatten() for name in mask])
        kept, lost = choose(mask, sizes.masked_fill(~alive, -1), count, "keep_one")
        if lost and self.on_collapse == "error":
            raise TostError(
                f"expected at least one weight in every layer, got none in {some(lost, 20)}; "
                f"set a lower sparsity, allocation: uniform, or on_collapse: keep_one"
            )
        tell(lost)
        return Mask(split(kept, mask))

    def run(
        self,
        model: nn.Module,
        train: Callable[[nn.Module, rewinding.Round], Mapping[str, float] | None],
        out: str | Path,
        resume: bool = False,
        save_every: int | None = None,
    ) -> list[dict[str, Any]]:
        """All rounds with a training function of one's own; returns a row per round, and leaves the last in `model`.

        `train(model, round)` makes its optimizer and schedule, trains the model inside `round.steps(...)` and returns
        numbers for the table, such as an accuracy, or None. Each call finds the model with its initial weights and
        buffers, masked, and torch's random state of the first; see `Round` for what rewinding to a later moment, and
        trainers of a framework, need. `out` gets round-00/mask.safetensors and so on, and lottery.csv, a line per round.

        With `resume` finished rounds are not run again; the one that was killed goes on from its last checkpoint if
        `save_every` (steps) made any, else from its beginning. Raises TostError for a folder that is in use, and when
        the function leaves weights outside its mask.

        Example:
            >>> import tempfile
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
        return rewinding.run(self, model, train, Path(out), resume, save_every)

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
