"""The input of a data-free method: a batch of one sample that is all ones, in the form that the network
takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable
from tost_plugins.training.batches import pick
from tost_plugins.training.calling import LABELS, call, inputs_in, scores_of
from tost_plugins.training.log import say
from tost_plugins.training.params import is_layer, is_transposed, plain_modules
from tost_plugins.training.task import Task

Shape = tuple[int, ...]

_SIDES = (32, 224)  # what a network for images is tried with: CIFAR's size, then ImageNet's


def batch(task: Task, weights: Mapping[str, Tensor], shape: Shape | None) -> Any:
    """A float64 batch of one sample of ones that the network runs on, `shape` without the batch dimension.

    Made like the first of the task's batches where there are any (without labels where the network can do
    without); else (ones, one label), of a shape that fits the first layer, which is logged. Raises
    TostError when none runs.
    """
    problem: BaseException | None = None
    for candidate in _candidates(task, shape):
        try:
            with torch.no_grad():
                total(task.outputs(weights, candidate, torch.float64, labels=False))
        except Exception as error:  # the user's network may raise anything
            problem = error.__cause__ or error
            if str(problem).startswith("synflow: "):  # it runs
                raise Inapplicable(str(problem)) from None
            continue
        if shape is None and task.batches is None:
            say(f"synflow: no batches and no input_shape, so the input is {tuple(candidate[0].shape[1:])}")
        return candidate
    raise Inapplicable(
        f"synflow: expected a network that runs on an input of ones, got {type(problem).__name__} "
        f"({problem}); pass input_shape=(channels, height, width) or batches"
    )


def _candidates(task: Task, shape: Shape | None) -> Iterator[Any]:
    if task.batches is not None:
        one = pick(task.take(1, "synflow")[0], [0])
        if isinstance(one, Mapping):
            yield _like({key: value for key, value in one.items() if key not in LABELS}, shape, 1)
        yield _like(one, shape, inputs_in(one, task.model) if task.forward is call else 1)
        return
    for guess in [shape] if shape is not None else shapes(task.model):
        ones = torch.ones(1, *guess, dtype=torch.float64, device=task.device)
        yield ones, torch.zeros(1, dtype=torch.long, device=task.device)


def _like(one: Any, shape: Shape | None, count: int) -> Any:
    """The sample with its inputs all ones, `count` of a tuple's; the first of them in another shape if one is given."""
    if isinstance(one, Tensor):
        if not one.is_floating_point() and shape is None:
            raise Inapplicable(f"synflow: expected inputs that are floating point, got {one.dtype}; pass input_shape")
        return torch.ones(one.shape if shape is None else (1, *shape), dtype=torch.float64, device=one.device)
    if isinstance(one, Mapping):
        inputs = [k for k, v in one.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in LABELS]
        if not inputs:
            raise Inapplicable(
                f"synflow: expected a batch with an input that is floating point, got the keys "
                f"{list(one)}; use another mask method"
            )
        return {**one, **{key: _like(one[key], shape if key == inputs[0] else None, 1) for key in inputs}}
    if isinstance(one, (tuple, list)) and one:
        return [_like(one[0], shape, 1), *(_ones(other) for other in one[1:count]), *one[count:]]
    raise Inapplicable(f"synflow: expected batches of tensors, got {type(one).__name__}; pass tensors, pairs or dicts")


def _ones(part: Any) -> Any:
    floating = isinstance(part, Tensor) and part.is_floating_point()
    return torch.ones(part.shape, dtype=torch.float64, device=part.device) if floating else part


def total(outputs: Any) -> Tensor:
    """The sum of the class scores: of the main output, or of all tensors in a dict that has several."""
    tensors = [part for part in outputs.values() if isinstance(part, Tensor)] if isinstance(outputs, Mapping) else []
    if len(tensors) > 1 and "logits" not in outputs and all(part.ndim for part in tensors):
        return torch.stack([part.sum() for part in tensors]).sum()
    return scores_of(outputs, "synflow").sum()


def shapes(model: nn.Module, sides: Sequence[int] = _SIDES) -> Iterator[Shape]:
    """Shapes of one sample that the first layer takes."""
    first: Any = next(module for _, module in plain_modules(model) if is_layer(module))
    if isinstance(first, nn.Linear) or is_transposed(first):
        yield (first.weight.shape[0 if is_transposed(first) else 1],)
    elif isinstance(first, nn.RNNBase):
        yield (8, first.input_size)  # a short sequence, where batches come first
    else:
        kernel = len(first.kernel_size)
        yield from ((first.in_channels, *[side] * kernel) for side in sides)
