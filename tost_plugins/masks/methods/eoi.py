"""Exact Orthogonal Initialization: each layer's mask is where a sparse orthogonal matrix is not 0, which it starts with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import top_k, top_mask
from tost_plugins.training.log import say
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import gates_of, owners, some
from tost_plugins.training.task import Task


def sparse_orthogonal(rows: int, columns: int, count: int, generator: torch.Generator) -> Tensor:
    """A random matrix with at most `count` numbers that are not 0, and orthonormal rows, or columns where there are fewer.

    float64, (rows, columns). It begins as a permutation with random signs, min(rows, columns) numbers, density
    1 / max(rows, columns), and is multiplied by random Givens rotations, each of two columns (rows where there are fewer
    columns): both are then not 0 wherever one of them was. The first rotation that would make more than `count` ends it, so
    that what is missing is less than one rotation's step; at rows * columns it is dense. With fewer than min(rows, columns)
    the other rows (columns) stay empty.

    Example:
        >>> found = sparse_orthogonal(4, 6, 12, torch.Generator().manual_seed(0))
        >>> bool(((found @ found.T - torch.eye(4)).abs() < 1e-12).all()), 8 < int(found.count_nonzero()) <= 12
        (True, True)
    """
    if rows > columns:
        return sparse_orthogonal(columns, rows, count, generator).T.contiguous()
    device, wide = generator.device, torch.float64
    ones = min(count, rows)
    turned = torch.zeros(columns, rows, dtype=wide, device=device)  # its rows are the columns, each in one piece
    signs = torch.randint(2, (ones,), generator=generator, device=device).to(wide) * 2 - 1
    places = [torch.randperm(size, generator=generator, device=device)[:ones] for size in (columns, rows)]
    turned[places[0], places[1]] = signs
    while ones == rows and (left := count - int(turned.count_nonzero())) > 0:
        # a round of rotations of which no two share a column, so that they are one
        order = torch.randperm(columns, generator=generator, device=device)
        half = columns // 2
        first, second = order[:half], order[half : 2 * half]
        angle = torch.rand(half, 1, generator=generator, device=device, dtype=wide) * (2 * math.pi)
        filled = turned != 0
        gain = (filled[first] ^ filled[second]).sum(1).cumsum(0)
        fits = int((gain <= left).sum())
        first, second, cos, sin = first[:fits], second[:fits], angle[:fits].cos(), angle[:fits].sin()
        a, b = turned[first], turned[second]
        turned[first], turned[second] = cos * a - sin * b, sin * a + cos * b
        if fits < half:
            break
    return turned.T.contiguous()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Eoi:
    """Draw a sparse orthogonal matrix for each layer by random Givens rotations: where it is not 0 is the mask, and the network
    starts with it, so that a signal keeps its length through layers however sparse; needs no data.

    Each layer keeps exactly as many weights as with `random` under the same seed. A rotation adds several at a time; the last
    few, less than one rotation's step, are drawn at random, and start at 0. A convolution's matrix stands at the centre of its
    kernel, as if it were 1 x 1 (delta-orthogonal); it has the layer's density, at least one weight a row, and the other weights
    are drawn at random from the kernel around it, and start at 0. Groups have a matrix each, and so have
    the gates of a recurrent layer. Without a weight for each row (for
    each column in a layer higher than wide), density 1 / max(rows, columns), some are empty, which a line says. Biases stay.

    The weights come in place of the network's own, those of a trained network too, when a run starts; a mask that is given, and
    one that `masks.find` returns, comes without.

    Fields: `sparsity` in [0, 1), 0 is dense; `allocation`, how the kept weights are shared out, "global" as a draw from all
    layers at once would; `weights`, what the network starts with, the "orthogonal" matrices or the weights that it has
    ("network"); `gain`, above 0, what the matrices are multiplied by: 1 keeps lengths in linear layers, sqrt(2) makes up for
    what ReLU takes; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer that loses everything.

    Paper: Nowak, Gniecki, Szatkowski, Tabor, Sparser, Better, Deeper, Stronger: Improving Static Sparse Training with Exact
    Orthogonal Initialization, ICML 2024.
    Differs from the paper: exact counts; a random permutation with signs to begin with, in place of the identity; rotations in
    rounds in which each column is turned once, where the paper draws each pair by itself; matrices of their own for groups; how
    a convolution's weights off the centre are shared out is ours.

    Example:
        >>> net = torch.nn.Linear(16, 8)
        >>> task, method = Task.of(net), Eoi(sparsity=0.75)
        >>> mask = method.start(task, torch.Generator().manual_seed(0))
        >>> weights = method.starting_weights(task, mask, torch.Generator().manual_seed(0))["weight"]
        >>> mask.kept, bool(((weights @ weights.T - torch.eye(8)).abs() < 1e-12).all()), weights[~mask["weight"]].any().item()
        (32, True, False)
    """

    kind: Literal["eoi"] = "eoi"
    sparsity: Sparsity
    allocation: Allocation = "erk"
    weights: Literal["orthogonal", "network"] = "orthogonal"
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 1.0
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask, drawn on the CPU."""
        draws = _draws(task, generator)
        counts = _counts(top_mask(draws, self.sparsity, self.allocation, self.on_collapse))
        layers = owners(task.model, dict(task.params))
        few = [name for name, draw in draws.items() if counts[name] < _least(draw, layers[name])]
        if few:
            say(
                f"mask eoi: {len(few)} layers keep fewer weights than they have rows (or columns, where there are fewer), and "
                f"leave some of them empty: {some(few)}"
            )
        matrices = _matrices(task, counts, generator)
        for (
            name,
            draw,
        ) in draws.items():  # what is not 0 first, then the kernel around the matrix, last the matrix's zeros
            draw[_center(draw)] -= 1
            draw += 3 * (matrices[name] != 0)
        return Mask({name: top_k(draw.flatten(), counts[name]).view(draw.shape) for name, draw in draws.items()})

    def starting_weights(self, task: Task, mask: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Name -> the weight that a run starts with, float64, from the generator state that gave the mask; none for "network"."""
        if self.weights == "network":
            return {}
        _draws(task, generator)
        return {name: self.gain * matrix for name, matrix in _matrices(task, _counts(mask), generator).items()}


def _draws(task: Task, generator: torch.Generator) -> dict[str, Tensor]:
    """A number from 0 to 1 for each weight."""
    return {
        name: torch.rand(param.shape, generator=generator, dtype=torch.float64, device=generator.device)
        for name, param in task.params.items()
    }


def _counts(mask: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(kept.sum()) for name, kept in mask.items()}


def _matrices(task: Task, counts: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Each layer's weight, with fewer than so many numbers that are not 0: a matrix for each group at the kernel's centre."""
    found = {}
    for name, layer in owners(task.model, dict(task.params)).items():
        weight = torch.zeros(task.params[name].shape, dtype=torch.float64, device=generator.device)
        groups, kernel = _groups(weight, layer), math.prod(weight.shape[2:])
        count = max(round(counts[name] / kernel), min(counts[name], _least(weight, layer)))
        shares = [count // groups + (group < count % groups) for group in range(groups)]
        rows = weight.shape[0] // groups
        weight[_center(weight)] = torch.cat(
            [sparse_orthogonal(rows, weight.shape[1], share, generator) for share in shares]
        )
        found[name] = weight
    return found


def _center(weight: Tensor) -> tuple[Any, ...]:
    """Where the matrix lies in a weight: at one place of the kernel, or everywhere."""
    return (..., *(side // 2 for side in weight.shape[2:]))


def _least(weight: Tensor, layer: nn.Module) -> int:
    """How many weights it takes for no row to be empty; no column in a layer that is higher than wide."""
    groups = _groups(weight, layer)
    return groups * min(weight.shape[0] // groups, weight.shape[1])


def _groups(weight: Tensor, layer: nn.Module) -> int:
    return gates_of(layer, weight) * getattr(layer, "groups", 1)  # type: ignore[operator]
