"""What finds a mask or an initialisation, written as its paper has it and as short as it gets: nothing is checked, the
model is used up, one batch is all there is. The floor under the library's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tost_plugins.training.params import prunable

Batch = tuple[Tensor, Tensor]


def forward_backward(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The pass that the others are measured in."""
    params = list(prunable(model).values())
    return list(torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params))


def highest(scores: list[Tensor], share: float) -> list[Tensor]:
    """True for this share of all scores, the highest."""
    flat = torch.cat([score.flatten() for score in scores])
    threshold = flat.kthvalue(flat.numel() - round(share * flat.numel()) + 1).values
    return [score >= threshold for score in scores]


def snip(model: nn.Module, batch: Batch) -> list[Tensor]:
    """|g w| (Lee et al., 2019)."""
    grads = forward_backward(model, batch)
    return [(grad * param.detach()).abs() for grad, param in zip(grads, prunable(model).values(), strict=True)]


def grasp(model: nn.Module, batch: Batch, temperature: float = 200.0) -> list[Tensor]:
    """w Hg, so that the highest stay (Wang et al., 2020)."""
    params = list(prunable(model).values())
    loss = F.cross_entropy(model(batch[0]) / temperature, batch[1])
    grads = torch.autograd.grad(loss, params, create_graph=True)
    dot = torch.stack([(grad * grad.detach()).sum() for grad in grads]).sum()
    return [param.detach() * product for param, product in zip(params, torch.autograd.grad(dot, params), strict=True)]


def synflow(model: nn.Module, shape: tuple[int, ...], density: float, rounds: int) -> list[Tensor]:
    """The masks of |w dR/dw| in rounds (Tanaka et al., 2020)."""
    model.double().eval()
    for param in model.parameters():
        param.data.abs_()
    params, ones = list(prunable(model).values()), torch.ones(1, *shape, dtype=torch.float64)
    kept = [torch.ones_like(param, dtype=torch.bool) for param in params]
    for turn in range(1, rounds + 1):
        grads = torch.autograd.grad(model(ones).sum(), params)
        scores = [(g * p.detach()).masked_fill_(~k, -1) for g, p, k in zip(grads, params, kept, strict=True)]
        kept = highest(scores, density ** (turn / rounds))
        for param, keep in zip(params, kept, strict=True):
            param.data.mul_(keep)
    return kept


def rescaled_init(model: nn.Module, batches: Iterator[Batch], masks: dict[str, Tensor], iterations: int) -> list[float]:
    """A number for each parameter (GradInit, Zhu et al., 2021, on the masked network)."""
    params = {name: p.detach() * masks[name] if name in masks else p.detach() for name, p in model.named_parameters()}
    scales = torch.ones(len(params), requires_grad=True)
    for_norm, for_loss = (torch.optim.Adam([scales], lr=0.003) for _ in range(2))
    images, labels = next(batches)
    for following in (next(batches) for _ in range(iterations)):
        theta = {name: param * scale for (name, param), scale in zip(params.items(), scales, strict=True)}
        loss = F.cross_entropy(functional_call(model, theta, images), labels)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        slopes = {name: g * masks[name] if name in masks else g for name, g in zip(theta, grads, strict=True)}
        goal = torch.stack([slope.norm() for slope in slopes.values()]).norm()
        large, half = goal > 1, len(labels) // 2
        if not large:
            ahead = {name: value - 0.1 * slopes[name] for name, value in theta.items()}
            mixed = [torch.cat([a[:half], b[half:]]) for a, b in zip((images, labels), following, strict=True)]
            goal = F.cross_entropy(functional_call(model, ahead, mixed[0]), mixed[1])
        (grad,) = torch.autograd.grad(goal, scales)
        scales.grad = grad.clamp(-1, 1)
        (for_norm if large else for_loss).step()
        with torch.no_grad():
            scales.clamp_(min=0.01)
        images, labels = following
    return scales.tolist()
