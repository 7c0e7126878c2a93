"""A mask that moves at random in recurrent layers, whose gates share one budget: Selfish-RNN."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT
from tost_plugins.masks.like import Shares
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.set import Set
from tost_plugins.masks.topk import top_k
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import gates_of, owners
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Selfish(Set):
    """`Set` for recurrent networks: every gate begins with as many weights, and then the gates of a layer compete for them.

    `nn.LSTM`, `nn.GRU` and `nn.RNN` keep all gates of a layer in one weight. At the start its kept weights are shared evenly
    among them (what is left over goes to the first ones). In an update the smallest weights of the layer go, whichever gate
    they are in, and as many grow at random anywhere in it; so the layer's count stays exact and a gate's does not. Other
    layers do what they do in `Set`, and so do the fields. Averages of weights that come back begin again with them:
    `torch.optim.ASGD` by itself, and `RestartingAverage` in tost_plugins.session.restarts (docs/masks.md).

    Paper: Liu et al., Selfish Sparse RNN Training, ICML 2021.
    Differs from the paper: the times are those of `Set`, where the paper moves once an epoch to the end of the training.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.GRU(4, 2))
        >>> mask = Selfish(sparsity=0.5, ignore=("0.weight_hh*",)).start(Task.of(net, ["0.weight_hh*"]), torch.Generator())
        >>> [int(gate.sum()) for gate in mask["0.weight_ih_l0"].chunk(3)]
        [4, 4, 4]
    """

    kind: Literal["selfish"] = "selfish"  # type: ignore[assignment]
    allocation: Shares = "uniform"
    drop: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.7

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """A random mask, alike in all gates of a layer; raises TostError as that of `Set` does."""
        first, layers = super().start(task, generator), owners(task.model, dict(task.params))
        return Mask({name: _alike(kept, gates_of(layers[name], kept), generator) for name, kept in first.items()})


def _alike(kept: Tensor, gates: int, generator: torch.Generator) -> Tensor:
    """As many weights, drawn again so that each gate has its part."""
    if gates == 1:
        return kept
    each, more = divmod(int(kept.sum()), gates)
    draws = torch.rand(kept.shape, generator=generator, dtype=torch.float64).view(gates, -1)
    parts = [top_k(draw, each + (place < more)) for place, draw in enumerate(draws)]
    return torch.stack(parts).view(kept.shape)
