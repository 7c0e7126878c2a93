"""Averages over steps that begin again with a weight which has come back: from before it has no values to be averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tost_plugins.errors import TostError
from tost_plugins.session.buffers import MASK
from tost_plugins.training.params import clean_name
from tost_plugins.training.sharding import is_part


class RestartingAverage(AveragedModel):
    """torch's `AveragedModel`, the equal average of the models it is shown, in which each weight is averaged since it was last
    grown; removed weights are 0, and biases, norms and all else are averaged as ever.

    Made after attach, of a model whose mask may move. `update_parameters(model)` at least once between two moves: what has
    gone and come back in between counts as never gone. What it counts is in its state dict. `session.plain(average)` gives the
    plain network. Raises TostError for a model without masks.

    Paper: Liu et al., Selfish Sparse RNN Training, ICML 2021 (SNT-ASGD).
    Differs from the paper: averages of models at any moments, where the paper's are those of every step since a trigger.

    Example:
        >>> from tost_plugins import Session
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = Session(net, {"mask": {"kind": "set", "sparsity": 0.5}, "tweaks": []}).attach()
        >>> average = RestartingAverage(net)
        >>> for weight, mask in ([4.0, 0.0], [1, 0]), ([2.0, 0.0], [1, 0]), ([1.0, 6.0], [1, 1]):
        ...     net.weight.data, net.weight_mask = torch.tensor([weight]), torch.tensor([mask]).bool()
        ...     average.update_parameters(net)
        >>> [round(value, 3) for value in average.module.weight.flatten().tolist()]
        [2.333, 6.0]
    """

    def __init__(self, model: nn.Module, device: Any = None) -> None:
        super().__init__(model, device)
        for place, (weight, _) in enumerate(_masked(self.module).values()):
            self.register_buffer(f"averaged_{place}", torch.zeros_like(weight, dtype=torch.int32))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model as it is now into the average."""
        own, theirs = _masked(self.module), _masked(model)
        before = [average.detach().clone() for average, _ in own.values()]
        super().update_parameters(model)
        for place, (name, (average, _)) in enumerate(own.items()):
            weight, kept = (tensor.detach().to(average.device) for tensor in theirs[name])
            count: Tensor = getattr(self, f"averaged_{place}")
            count.add_(1).mul_(kept)
            average.copy_(torch.where(kept, _joined(before[place], weight, count), 0))


def restart(optimizers: Iterable[Any], weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """After a step: in the average `ax` that `torch.optim.ASGD` keeps of each weight, those that have come back begin again.

    The optimizer's state of a weight gets `averaged`, the number of steps in each entry's average, and `averaged_step`, the
    step at which they were counted. Weights that were never away keep ASGD's own numbers, bit for bit. Weights that ranks hold
    in parts, and other optimizers, are left alone.

    Paper: Liu et al., Selfish Sparse RNN Training, ICML 2021 (SNT-ASGD).
    Differs from the paper: averaging begins at the optimizer's own `t0`; the paper's trigger is for the loop to choose.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.ASGD):
            began = {id(param): group["t0"] for group in optimizer.param_groups for param in group["params"]}
            for name, weight in weights.items():
                if weight in optimizer.state and not is_part(weight):
                    _restart(optimizer.state[weight], weight.detach(), kept[name] != 0, began[id(weight)])


@torch.no_grad()
def _restart(state: dict[str, Any], weight: Tensor, kept: Tensor, began: float) -> None:
    step = int(state["step"])
    if state.get("averaged_step") == step:  # the step was not taken
        return
    most = max(1.0, step - 1 - began)  # what ASGD has divided the newest value by
    before = state.get("averaged", torch.full_like(weight, math.ceil(most) - 1, dtype=torch.int32))
    count = torch.where(kept, (before.to(torch.int32) + 1).clamp(max=math.ceil(most)), 0)
    if most > 1:
        previous = (state["ax"] * most - weight) / (most - 1)
        state["ax"].copy_(torch.where(count < most, _joined(previous, weight, count), state["ax"]))
    state["ax"].masked_fill_(~kept, 0)
    state["averaged"], state["averaged_step"] = count, step


def _joined(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """The average of `count` values, the last of which is `weight`; the first one alone is itself."""
    return torch.where(count <= 1, weight, average + (weight - average) / count.clamp(min=1))


def _masked(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> a weight and the mask beside it."""
    masks = {clean_name(name).removesuffix(MASK): each for name, each in model.named_buffers() if name.endswith(MASK)}
    params = {clean_name(name): param for name, param in model.named_parameters()}
    found: dict[str, tuple[Tensor, Tensor]] = {
        name: (params[name], mask) for name, mask in masks.items() if name in params
    }
    if not found:
        raise TostError(
            f"average: expected a model with masks, got {type(model).__name__} without any; make it after attach, and update it "
            f"before finish"
        )
    return found
