"""A mask from SynFlow: needs no data, and keeps a path through every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.errors import Inapplicable
from tost_plugins.masks import ones
from tost_plugins.masks.base import STRICT, Allocation, Budget, OnCollapse, Sparsity
from tost_plugins.masks.budget import live_mask, ordered
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Paths
from tost_plugins.masks.scoring import derivative, weights_to_score
from tost_plugins.masks.topk import choose, count_true, counts, dense_layers, split, tell, tell_ties, tied
from tost_plugins.training.functions import Instead
from tost_plugins.training.log import shown
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task, untouched


def _check_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > 10**8:
        raise ValueError(
            f"expected a sample of at most 100,000,000 numbers, got {math.prod(shape):,}; correct its sides"
        )
    return shape


_Shape = Annotated[
    tuple[Annotated[int, Field(ge=1, le=10**8), NUMBER], ...],
    Field(min_length=1, max_length=8),
    AfterValidator(_check_size),
]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SynFlow:
    """Keep the weights that carry most of the synaptic flow |w| * dR/d|w|, in many small rounds.

    R is the sum of the logits of a network with |parameters| (norms and biases too), in eval mode and
    float64, on one input of ones. From round to round the density falls by the same factor, to that of
    `sparsity` in the last.

    Fields: `sparsity` in [0, 1), 0 is dense; `rounds`, 1 (one shot) or more; `input_shape`, that of one
    sample without the batch dimension, such as (3, 32, 32), by default that of the batches, or one that
    fits the first layer; `allocation`, "global" compares all layers; `ignore`, globs of layers to leave
    alone; `on_collapse`, for a layer that loses everything; `budget`, whether
    the sparsity counts what is "kept" or what is "live", on a path
    (docs/masks.md). The batches' values are never looked at.

    Paper: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
    NeurIPS 2020.
    Differs from the paper: the norms' running statistics stay as they are, the published code takes their
    magnitude. Since they saturate in a network of magnitudes, ReLU6 is ReLU while scoring, and a sigmoid (of a squeeze-excite
    layer, say) passes on as much flow as it gets. A norm that starts at 0 counts as 1.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> SynFlow(sparsity=0.75, input_shape=(8,)).start(Task.of(net), torch.Generator()).kept
        20
    """

    kind: Literal["synflow"] = "synflow"
    sparsity: Sparsity
    allocation: Allocation = "global"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    budget: Budget = "kept"
    rounds: Annotated[int, Field(ge=1, le=100_000), NUMBER] = 100
    input_shape: _Shape | None = None

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask; raises TostError when the network does not run on such an input, when its scores are
        infinite (too deep) or all 0."""
        with untouched(task.model, task.batches, train=False):
            weights = weights_to_score(task, "synflow", torch.float64)
            weights = {name: weight.detach().abs_() for name, weight in weights.items()}
            batch = ones.batch(task, weights, self.input_shape)
            first = {name: w.clone() for name, w in task.leaves(weights).items()} if self.budget == "live" else {}
            kept, revived, undecided = self._rounds(task, weights, batch)
            mask = self._live(task, weights, first, batch, kept) if first else Mask(split(kept, task.params))
        tell(revived)
        tell_ties(undecided)
        return mask

    def _live(self, task: Task, weights: dict[str, Tensor], first: dict[str, Tensor], batch: Any, kept: Tensor) -> Mask:
        """What of the last round lies on a path, and in the place of the others those that would carry most flow now."""
        scores = torch.empty(kept.shape, dtype=torch.float64, device=kept.device)
        synaptic_flow(task, weights, batch, split(scores, first), first)
        order = ordered(split(scores, first), scores, counts(first, self.sparsity, self.allocation))
        stay = kept[order]
        return live_mask(torch.cat([order[stay], order[~stay]]), first, int(count_true(kept)), Paths(task))

    def _rounds(self, task: Task, weights: dict[str, Tensor], batch: Any) -> tuple[Tensor, list[str], list[str]]:
        """True for the weights that stay, in one row, the layers which "keep_one" had to help in some round, and those
        whose scores of 0 decided nothing."""
        own = task.leaves(weights)
        kept = torch.ones(sum(w.numel() for w in own.values()), dtype=torch.bool, device=task.device)
        scores = torch.empty(kept.shape, dtype=torch.float64, device=task.device)
        dense = dense_layers(own, counts(own, self.sparsity, self.allocation))
        revived: dict[str, None] = {}
        undecided: dict[str, None] = {}
        for count in shown(self._counts(own), self.rounds, "synflow: round"):
            synaptic_flow(task, weights, batch, split(scores, own))
            scores.masked_fill_(~kept, -1)  # what is gone never returns
            kept, lost = choose(own, scores, count, self.on_collapse, dense)
            revived |= dict.fromkeys(lost)
            undecided |= dict.fromkeys(tied(scores, kept, count, own))
            for name, mask in split(kept, own).items():
                own[name].mul_(mask)
        return kept, list(revived), list(undecided)

    def _counts(self, weights: Mapping[str, Tensor]) -> Iterator[dict[str, int] | int]:
        """How many weights stay after each round: size * density ** (round / rounds)."""
        sizes = {name: weight.numel() for name, weight in weights.items()}
        last = counts(weights, self.sparsity, self.allocation)
        for turn in range(1, self.rounds + 1):
            share = turn / self.rounds
            if isinstance(last, int):
                yield _decayed(sum(sizes.values()), last, share)
            else:
                yield {name: _decayed(size, last[name], share) for name, size in sizes.items()}


def _decayed(size: int, last: int, share: float) -> int:
    return round(size * (max(last, 1) / size) ** share) if size and share < 1 else last


_SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, F.hardsigmoid)


def _relu6(input: Tensor, inplace: bool = False) -> Tensor:
    return (input.clamp_ if inplace else input.clamp)(min=0)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return (input.clamp_ if inplace else input.clamp)(min=min_val)


def _conserved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with the slope value / x: as much flow x * dR/dx enters it as leaves it, value * dR/dvalue."""

    def conserving(input: Tensor, inplace: bool = False) -> Tensor:
        value = function(input.detach())
        slope = torch.where(input.detach() == 0, 0, value / input.detach())
        return value + slope * (input - input.detach())

    return conserving


#: In a network of magnitudes relu6 and hardtanh saturate, so they go without their upper ends, and sigmoids conserve the flow.
UNCAPPED = {F.relu6: _relu6, F.hardtanh: _hardtanh} | {function: _conserved(function) for function in _SIGMOIDS}


def synaptic_flow(
    task: Task,
    weights: Mapping[str, Tensor],
    batch: Any,
    out: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor] | None = None,
) -> None:
    """Write w * dR/dw of every prunable weight to `out`, R the sum of the logits on `batch`; with `sizes` those times dR/dw.

    Raises TostError on a weight that R does not depend on, and when R is infinite, or 0 for all the
    weights' worth.
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with Instead(UNCAPPED):
        total = ones.total(task.outputs(weights, batch, torch.float64, labels=False))
    own = task.leaves(weights)
    for name, grad in derivative(total, own, "synflow").items():
        torch.mul(grad, (sizes or own)[name].detach(), out=out[name]).abs_()
    if not bool(torch.isfinite(total)):
        raise Inapplicable(
            "synflow: expected a finite sum of outputs, got infinity; the network is too deep for float64, "
            "use another mask method"
        )
    if not any(bool(score.any()) for score in out.values()):
        raise Inapplicable(
            "synflow: expected outputs that depend on the weights, got scores of 0 everywhere; "
            "check for activations that saturate and layers that are all 0, or use another mask method"
        )
