"""What a trained network stands: pruned further without retraining, by magnitude and at random."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import split, top_k
from tost_plugins.training import seeds
from tost_plugins.training.batches import to_device
from tost_plugins.training.calling import call
from tost_plugins.training.params import device_of, prunable

How = Literal["magnitude", "random"]


def prune_further(
    weights: Mapping[str, Tensor],
    mask: Mask,
    share: float,
    how: How = "magnitude",
    generator: torch.Generator | None = None,
) -> Mask:
    """The mask with `share` (0 to 1) of its remaining weights taken out too, over all layers together.

    "magnitude" takes the smallest ones, "random" draws them with `generator`. A layer may lose all its weights: that
    is what the network is tried for. 0 changes nothing.

    Example:
        >>> weights = {"w": torch.tensor([[0.1, -3.0, 0.0, 2.0]])}
        >>> prune_further(weights, Mask.from_zeros(weights), 1 / 3)["w"].tolist()
        [[False, True, False, True]]
    """
    if not 0 <= share <= 1:
        raise TostError(f"prune_further: expected a share from 0 to 1, got {share!r}; 20 % is written 0.2")
    kept = torch.cat([keep.flatten() for keep in mask.values()])
    if how == "magnitude":
        score = torch.cat([weights[name].detach().cpu().double().abs().flatten() for name in mask])
    else:
        score = torch.rand(kept.numel(), generator=generator, dtype=torch.float64)
    left = mask.kept - round(share * mask.kept)
    return Mask(split(top_k(score.masked_fill(~kept, float("-inf")), left), mask))


def robustness(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float],
    batches: Iterable[Any] | None = None,
    draws: int = 10,
    seed: int = 0,
    ignore: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each share, way of choosing, draw and treatment of the norms: `accuracy`, what `evaluate(model)` returns.

    The model is pruned further by each of `shares` (of its remaining weights) by magnitude and `draws` times at random,
    without retraining. `norms` is "kept", or, with `batches`, "re-estimated": the running statistics of batch norms
    are taken anew over these batches. The model itself is not changed.

    Paper: Van Gelder et al., Deconstructing the Structure of Sparse Neural Networks, 2020, figure 2.
    Differs from the paper: nothing that its text tells.
    """
    rows = []
    weights = prunable(model, ignore)
    mask = Mask.from_zeros(weights)
    for share in shares:
        for how, number in [("magnitude", 0), *(("random", draw) for draw in range(draws))]:
            further = prune_further(weights, mask, share, how, seeds.generator(seed, number))  # type: ignore[arg-type]
            pruned = copy.deepcopy(model)
            further.apply_(prunable(pruned, ignore))
            rows.append({"share": share, "how": how, "draw": number, "norms": "kept", "accuracy": evaluate(pruned)})
            if batches is not None:
                reestimate_norms(pruned, batches)
                rows.append({**rows[-1], "norms": "re-estimated", "accuracy": evaluate(pruned)})
    return rows


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give every batch norm the mean statistics of these batches; the model's mode stays.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> reestimate_norms(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> net[0].running_mean.tolist(), net.training
        ([4.0], False)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    was, momenta, device = model.training, [norm.momentum for norm in norms], device_of(model)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    modes = [(m, m.training) for m in model.modules() if m not in norms]
    for module, _ in modes:
        module.training = False  # dropout has no say in it
    for batch in batches:
        call(model, to_device(batch, device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was)
