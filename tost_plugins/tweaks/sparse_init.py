"""Starting weights that suit the mask: each neuron at the scale of the inputs it keeps, and layers close to an isometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable
from tost_plugins.training import ranks
from tost_plugins.training.log import say
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import gates_of, is_transposed, owners
from tost_plugins.training.task import Task
from tost_plugins.tweaks.base import STRICT, Tweak

_FLAT = 1e-6  # of the distance: what a step must gain, or the search is over

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fan_in_scale(kept: Tensor) -> Tensor:
    """What to multiply each neuron by so that its sum over the kept inputs varies as it did over all: sqrt(all / kept).

    `kept` is (..., neurons, inputs), bool; the result (..., neurons, 1), from 1 (nothing is removed) to sqrt(inputs) (one is
    kept); 1 also where nothing is kept.

    Example:
        >>> fan_in_scale(torch.tensor([[True, False, False, False], [True] * 4, [False] * 4])).flatten().tolist()
        [2.0, 1.0, 1.0]
    """
    count = kept.sum(-1, keepdim=True)
    return torch.where(count > 0, kept.shape[-1] / count.clamp(min=1), 1.0).sqrt()


def near_isometry(rows: Tensor, kept: Tensor, steps: int) -> tuple[Tensor, float, float]:
    """Weights on the same support that come close to orthonormal rows, or columns where there are fewer of them.

    Gradient descent on |W W^T - I|^2 (|W^T W - I|^2 where W is higher than wide) from `rows`, which are first brought to length
    1; the gradient is 4 (W W^T - I) W where `kept`, the step halves where it would not help. `rows` is (groups, neurons,
    inputs), each group a matrix of its own; rows that are empty stay so. Returns the weights, and the distances before and
    after: the root of the mean square of a row's share, 0 is an isometry.

    Example:
        >>> rows = torch.tensor([[[1.0, 1.0, 0.0], [1.0, -0.5, 0.0]]])
        >>> found, before, after = near_isometry(rows, rows != 0, 100)
        >>> round(before, 3), after < 1e-3, found[0, 0, 2].item()
        (0.316, True, 0.0)
    """
    high = rows.shape[-2] > rows.shape[-1]
    weight, kept = (tensor.mT if high else tensor for tensor in (rows * kept, kept.to(rows.dtype)))
    sizes = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    weight = weight / torch.where(sizes > 0, sizes, 1)
    aim = torch.diag_embed((sizes > 0).squeeze(-1).to(rows.dtype))
    count = float(aim.sum()) or 1.0

    def look(weight: Tensor) -> tuple[float, Tensor]:
        off = weight @ weight.mT - aim
        return float(off.square().sum()), 4 * (off @ weight) * kept

    first, slope = look(weight)
    now, step = first, 0.1
    for _ in range(steps):
        moved = weight - step * slope
        then, following = look(moved)
        if then < now:
            flat = now - then < _FLAT * now
            weight, now, slope, step = moved, then, following, step * 1.2
            if flat:
                break
        else:  # also where it is not finite
            step /= 2
    return weight.mT if high else weight, (first / count) ** 0.5, (now / count) ** 0.5


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SparseInit(Tweak):
    """Scales each neuron's starting weights by the inputs it keeps; with `isometry: approximate` each layer also comes close
    to an isometry. Acts once, when the mask is there.

    An initialisation such as Kaiming's divides by the root of the fan-in, which a mask makes smaller, and in each neuron
    differently: multiplied by sqrt(fan-in / kept fan-in) each neuron's output varies as in the dense network. It rescales
    what is there, whatever drew it; biases and layers without a mask stay. A network whose norms have counted batches has
    been trained, and is refused (with `optional: true` left out); without norms nobody can tell. Put it before `rescaled_init`.

    Fields: `isometry`, "approximate" moves the kept weights of each layer, a convolution's as outputs x (inputs * kernel), toward
    orthonormal rows, or columns where there are fewer; None does not. `steps`, from 1, at most that many gradient steps for
    it; each costs two products of the layer with itself, and it ends where nothing is gained any more.

    Paper: Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, AAAI 2022 (the kept fan-in);
    Lee et al., A Signal Propagation Perspective for Pruning Neural Networks at Initialization, ICLR 2020 (`isometry`).
    Differs from the paper: scales what is there in place of drawing anew. `isometry`: the layer's norm goes back to what the
    kept fan-in makes of the layer's own initialisation, where the paper leaves each singular value at 1; the step adapts
    itself; rows where a layer is wider than high, else columns.

    Example:
        >>> net = nn.Linear(4, 1, bias=False)
        >>> _ = nn.init.ones_(net.weight)
        >>> SparseInit().start(Task.of(net), {"weight": torch.tensor([[True, False, False, False]])})
        >>> net.weight.tolist()  # those that are removed are 0 by then, in a run
        [[2.0, 2.0, 2.0, 2.0]]
    """

    kind: Literal["sparse_init"] = "sparse_init"
    isometry: Literal["approximate"] | None = None
    steps: Annotated[int, Field(ge=1, le=100_000), NUMBER] = 300

    def look(self, task: Task) -> None:
        counted = max((int(n) for m in task.model.modules() if (n := _batches_of(m)) is not None), default=0)
        if counted:
            raise Inapplicable(
                f"sparse_init: expected a network that has not been trained, got norms that have counted {counted} batches; "
                f"leave sparse_init out, or reset_running_stats() of a network that is new all the same"
            )

    @torch.no_grad()
    def start(self, task: Task, mask: Mapping[str, Tensor]) -> None:
        layers, found, seen = owners(task.model, dict(task.params)), {}, []
        for name, param in task.params.items():
            if name in mask:
                found[name], look = self._of(param.detach(), mask[name].to(param.device), layers[name])
                seen.append(look)
        for name, value in ranks.broadcast(found, task.device).items():
            task.params[name].copy_(value)
        _report(seen)

    def _of(self, weight: Tensor, kept: Tensor, layer: nn.Module) -> tuple[Tensor, tuple[float, ...]]:
        """A layer's starting weights; the least and largest scale, and the distances from an isometry."""
        rows, inside = _rows(weight, layer), _rows(kept, layer)
        scale = fan_in_scale(inside)
        rows, scales = rows * scale.to(rows.dtype), (float(scale.min()), float(scale.max()))
        size = torch.linalg.vector_norm((rows * inside).double())
        if self.isometry is None or not size:
            return _back(rows, weight, layer), scales
        wide = rows.double() if rows.dtype == torch.float64 else rows.float()
        close, before, after = near_isometry(wide, inside, self.steps)
        close = close * (size / torch.linalg.vector_norm(close.double())).to(close.dtype)
        rows = torch.where(inside, close.to(rows.dtype), rows)  # what waits out of sight keeps its own
        return _back(rows, weight, layer), (*scales, before, after)


def _batches_of(module: nn.Module) -> Any:
    return module._buffers.get("num_batches_tracked")


def _rows(tensor: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight, or its mask, as (groups, neurons, inputs); gates are groups."""
    if is_transposed(layer):
        return tensor.mT[None]
    groups: int = gates_of(layer, tensor) * getattr(layer, "groups", 1)  # type: ignore[operator]
    if isinstance(layer, _TRANSPOSED):
        return tensor.reshape(groups, -1, *tensor.shape[1:]).transpose(1, 2).flatten(2)
    return tensor.reshape(groups, tensor.shape[0] // groups, -1)


def _back(rows: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """Rows as `_rows` gives them, in the shape of the weight."""
    if is_transposed(layer):
        return rows[0].mT
    if isinstance(layer, _TRANSPOSED):
        groups, outputs, _ = rows.shape
        rows = rows.reshape(groups, outputs, weight.shape[0] // groups, *weight.shape[2:]).transpose(1, 2)
    return rows.reshape(weight.shape)


def _report(seen: list[tuple[float, ...]]) -> None:
    low, high = min(look[0] for look in seen), max(look[1] for look in seen)
    text = f"sparse_init: neurons of {len(seen)} layers scaled by {low:.3g} to {high:.3g} for the inputs they keep"
    close = [look[2:] for look in seen if len(look) == 4]
    if close:
        before, after = (sum(look[i] for look in close) / len(close) for i in (0, 1))
        text += f"; {len(close)} layers, {before:.3g} from an isometry, are {after:.3g} from it"
    say(text)
