"""Rescaled initialisation: before training, each parameter tensor is multiplied by one learned number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice, pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training import ranks
from tost_plugins.training.batches import size_of
from tost_plugins.training.log import say, shown
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import clean_name, plain_modules
from tost_plugins.training.task import Task, untouched
from tost_plugins.tweaks.base import STRICT, Tweak
from tost_plugins.tweaks.look_ahead import Look, Objective, masked, placed

_Positive = Annotated[float, Field(gt=0), NUMBER]
_Finite = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]

#: How many iterations there are at most where nobody says it, what one costs in training steps (at most: where the optimizer is
#: cheap and the machine busy), and what share of a run's steps all of them may cost.
_MOST, _COST, _SHARE = 180, 6, 0.05

#: How far all iterations together may move a number, and one of them, where nobody says it: 180 iterations at 0.003.
_WAY, _FASTEST = 0.54, 0.01

#: Over how many iterations the objective is averaged, twice, to see whether it still falls.
_SPAN = 20


def rescale(
    task: Task,
    mask: Mapping[str, Tensor],
    *,
    iterations: int | None = None,
    learning_rate: float | None = None,
    look_ahead: float = 0.1,
    norm: float = 1.0,
    min_scale: float = 0.01,
    clip: float = 1.0,
) -> dict[str, float]:
    """Parameter name -> the number to multiply its initial values by, learned on the masked network.

    The model stays as it is. The arguments mean what the fields of `RescaledInit` mean. Every rank gets the
    same numbers: gradients are averaged over the ranks, as in a training step on all their batches together.
    Raises TostError without batches, on batches that can be read only once, and on a loss or gradients that
    are not finite; Inapplicable on a network that cannot be differentiated twice.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(6, 4), torch.tensor([0, 1] * 3))]
        >>> list(rescale(Task.of(net, batches=batches), {}, iterations=2))
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    count = iterations or affordable(task.steps)
    rate = learning_rate or min(_FASTEST, _WAY / count)
    params = {name: param.detach() for name, param in trainable(task.model).items()}
    known_as = {id(param): name for name, param in task.params.items()}  # a tied weight's layer may have another name
    own = {name: known_as.get(id(param), name) for name, param in trainable(task.model).items()}
    kept = {n: mask[own[n]].to(param.device, param.dtype) for n, param in params.items() if own[n] in mask}
    weights = {name: masked(param, kept.get(name)) for name, param in params.items()}
    objective = Objective(task, kept, look_ahead, norm)
    scales = torch.ones(len(weights), device=task.device, dtype=torch.float32)
    # Two memories for one set of scales: the slopes of the norm and of the loss differ in size.
    for_norm, for_loss = (torch.optim.Adam([scales], lr=rate) for _ in range(2))
    looks: list[Look] = []
    turns = shown(islice(pairwise(_endless(task)), count), count, "rescaled_init: iteration")
    with untouched(task.model, task.batches, train=True), closing(turns):
        for batch, following in turns:
            with placed(f"rescaled_init, iteration {len(looks) + 1}"):
                slopes, look = objective.by_scale(weights, scales, batch, following)
            looks.append(look)
            scales.grad = slopes.clamp(-clip, clip)
            (for_norm if look.ahead is None else for_loss).step()
            scales.clamp_(min=min_scale)
            if iterations is None and _settled(looks):
                break
    scales = ranks.broadcast({"": scales}, task.device)[""]
    _report(looks, scales, norm, _fewer(len(looks), iterations, task.steps))
    return dict(zip(weights, scales.tolist(), strict=True))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RescaledInit(Tweak):
    """Multiplies each parameter tensor by a number, learned so that the first training step does most good.

    Each iteration takes the masked gradient of a batch. While its norm is above `norm`, the numbers move to
    lower the norm; otherwise they move to lower the loss after one SGD step of size `look_ahead` along that
    gradient, on half of the batch and half of the next one. Inside a tensor the initial values keep their
    ratios and signs, and pruned weights stay 0. BatchNorm uses the batch; its running statistics stay.

    Fields: `iterations`, from 1; each costs as much as 3 or 4 training steps; None is 180, or fewer where those would cost more
    than 5 % of the run's steps, or where neither objective falls any more. `look_ahead`, best the
    optimizer's learning rate; toward 0 only the loss itself counts. `norm`: toward 0 only the norm is
    lowered, infinity never limits it. `learning_rate`, about how far one iteration moves a number, which
    starts at 1: 0.003 suits 180 iterations of networks with norms, 0.03 those without; None is 0.54 over the number of
    iterations, at most 0.01, so that few of them go as far. `min_scale` in (0, 1], the smallest
    number; 1 only lets them grow. `clip`, the bound of each number's slope; toward 0 the slopes' signs alone
    count, infinity leaves them as they are.

    Paper: "Training Your Sparse Neural Network Better with Any Mask" (Jaiswal et al., ICML 2022), section 3,
    with the objective of "GradInit" (Zhu et al., NeurIPS 2021).
    Differs from the paper: slopes go through the whole look-ahead step, whose length is the gradient's, where
    GradInit's code holds the gradient fixed and sets its length to 1. Biases have the same `min_scale` as
    weights. Dropout stays on. One `learning_rate` for all networks; GradInit's code has 0.001 to 0.1.

    Example:
        >>> RescaledInit(iterations=20, look_ahead=0.05).min_scale
        0.01
    """

    kind: Literal["rescaled_init"] = "rescaled_init"
    iterations: Annotated[int, Field(ge=1, le=100_000), NUMBER] | None = None
    learning_rate: _Finite | None = None
    look_ahead: _Finite = 0.1
    norm: _Positive = 1.0
    min_scale: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.01
    clip: _Positive = 1.0

    def look(self, task: Task) -> None:
        try:
            trainable(task.model)
            with untouched(task.model, task.batches, train=True):
                (batch,) = task.take(1, "rescaled_init")
                with placed("rescaled_init"):
                    task.loss_at(task.weights(), batch)
        except TostError as error:
            raise Inapplicable(str(error)) from error

    def start(self, task: Task, mask: Mapping[str, Tensor]) -> None:
        names = ("iterations", "learning_rate", "look_ahead", "norm", "min_scale", "clip")
        try:
            scales = rescale(task, mask, **{name: getattr(self, name) for name in names})
        except TostError as error:  # what is optional stops no run
            raise Inapplicable(str(error)) from error
        with torch.no_grad():
            for name, param in trainable(task.model).items():
                param.mul_(scales[name])


def affordable(steps: int | None) -> int:
    """The iterations for a run of so many steps: 180, or what 5 % of the steps pay for, at least one.

    Example:
        >>> affordable(None), affordable(100_000), affordable(2_400)
        (180, 180, 20)
    """
    return _MOST if steps is None else min(_MOST, max(1, int(_SHARE * steps / _COST)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Clean name -> parameter that requires grad: tied ones once, no ghosts; raises TostError on none."""
    found: dict[nn.Parameter, str] = {}
    for path, module in plain_modules(model):
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and param.numel():
                found.setdefault(param, clean_name(f"{path}.{name}" if path else name))
    if not found:
        have = f"got none in {type(model).__name__}"
        raise TostError(f"rescaled_init: expected parameters that require grad, {have}; unfreeze some, or leave it out")
    return {name: param for param, name in found.items()}


def _settled(looks: list[Look]) -> bool:
    """Whether the objective no longer falls: each of the two that have been looked at lately."""
    norms = [look.norm for look in looks if look.ahead is None]
    losses = [look.ahead for look in looks if look.ahead is not None]
    late = {look.ahead is None for look in looks[-_SPAN:]}
    seen = [values for values, which in ((norms, True), (losses, False)) if which in late]
    return all(len(v) >= 2 * _SPAN and sum(v[-_SPAN:]) >= sum(v[-2 * _SPAN : -_SPAN]) for v in seen)


def _fewer(count: int, iterations: int | None, steps: int | None) -> str:
    """Why there were fewer iterations than there may be, for the line; nothing where there were as many as asked for."""
    if iterations or count == _MOST:
        return ""
    if count < affordable(steps):
        return f" (in place of {affordable(steps)}: the objective no longer falls)"
    return f" (in place of {_MOST}: they may cost {_SHARE:.0%} of the run's {steps} steps)"


def _endless(task: Task) -> Iterator[Any]:
    """The task's batches on its device, from the beginning again whenever they end; not a last one of a lone sample, which
    batch norm does not take."""
    least = min(
        2, size_of(task.take(1, "rescaled_init")[0])
    )  # raises where there is nothing to read, or nothing to read twice
    while True:
        yield from (batch for batch in task.batches or () if size_of(batch) >= least)


def _report(looks: list[Look], scales: Tensor, limit: float, why: str) -> None:
    losses, norms, ahead = zip(*looks, strict=True)
    seen = [loss for loss in ahead if loss is not None]
    say(
        f"rescaled_init: {len(scales)} tensors scaled by {scales.min():.3g} to {scales.max():.3g}; "
        f"loss {losses[0]:.4g} -> {losses[-1]:.4g}"
        + (f", one step ahead {seen[0]:.4g} -> {seen[-1]:.4g}" if seen else "")
        + f"; gradient norm {norms[0]:.4g} -> {norms[-1]:.4g}, "
        f"above {limit:g} in {len(looks) - len(seen)} of {len(looks)} iterations" + why
    )
