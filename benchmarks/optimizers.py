"""Every optimizer of torch under a static mask and under RigL, beside training the kept weights alone: docs/optimizers.md.

    python benchmarks/optimizers.py          # about half a minute; writes the page

"alone" is the same network made from vectors of its kept weights, which never had the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins import Session, TostError, masks
from tost_plugins.session.optimizer_state import start_values

STEPS, SPARSITY = 60, 0.9
PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"
HEAD = f"""# Optimizers

Written by `python benchmarks/optimizers.py`: a network of two linear layers, {STEPS} steps at torch's default settings, a
random mask of {SPARSITY:.0%}. "zeros": after how many steps all removed weights were exactly 0. "as alone": the largest
difference of a kept weight to the same training of the kept weights alone, divided by the largest weight. "starts": what the
optimizer keeps for a new weight, with which a weight that RigL brings back starts. In a plain loop; other optimizers, wrappers
and several of them at once: [session.md](session.md), `tests/session/test_optimizers.py`.

| optimizer | zeros | as alone | zeros under RigL | starts |
| --- | --- | --- | --- | --- |
"""
TAIL = """
Where "as alone" is far from 0 the optimizer looks at whole tensors, in which removed weights count: Adafactor by root mean
squares, Muon (in newer versions of torch) by orthogonalising matrices. L-BFGS, SparseAdam and optimizers of other packages are
not in the table.
"""
SKIPPED = {"Optimizer", "LBFGS", "SparseAdam"}


def network() -> nn.Sequential:
    """Two linear layers without biases, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False)).double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same ones each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(32, 16, generator=generator, dtype=torch.float64)
        yield x, (x[:, :4] ** 2).argmax(1)


def trained(make: Callable[[Any], Optimizer], mask: dict[str, Any], given: masks.Mask | None) -> tuple[nn.Module, int]:
    """The network at the end, and after how many steps all removed weights were 0."""
    net, clean = network(), 0
    optimizer = make(net.parameters())
    session = Session(net, {"mask": mask}, given)
    with session.drive(optimizer, total_steps=STEPS):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            clean += not any(bool(net.get_parameter(n).detach()[~keep].any()) for n, keep in session.mask.items())
    return net, clean


def alone(make: Callable[[Any], Optimizer], mask: masks.Mask) -> dict[str, Tensor]:
    """The weights of a network that never had the removed ones: only a vector of the kept ones trains, laid out as they are."""
    net = network()
    rows = {name: nn.Parameter(net.get_parameter(name).detach()[keep]) for name, keep in mask.items()}
    optimizer = make(rows.values())

    def weights() -> dict[str, Tensor]:
        return {n: torch.zeros(k.shape, dtype=torch.float64).masked_scatter(k, rows[n]) for n, k in mask.items()}

    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(net, weights(), x), y).backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in weights().items()}


def row(cls: type[Optimizer]) -> str:
    """The optimizer's line of the table."""

    def make(params: Any) -> Optimizer:
        return cls(params) if cls is not torch.optim.SGD else torch.optim.SGD(params, 0.1, momentum=0.9)

    mask = masks.find(network(), "random", SPARSITY)
    net, clean = trained(make, {"kind": "random", "sparsity": SPARSITY}, mask)
    try:
        other = alone(make, mask)
        gap = max(float((net.get_parameter(n).detach() - w).abs().max() / w.abs().max()) for n, w in other.items())
        beside = f"{gap:.1e}" if gap > 1e-12 else "0"
    except (ValueError, RuntimeError) as error:
        beside = f"does not train vectors ({type(error).__name__})"
    try:
        moved = f"{trained(make, {'kind': 'rigl', 'sparsity': SPARSITY, 'every': '5ba'}, None)[1]} of {STEPS}"
    except TostError as error:
        moved = f"refused: {error}"
    weight = next(net.parameters())
    starts = ", ".join(f"`{key}` {value:g}" for key, value in start_values(make([weight]), weight).items()) or "nothing"
    return f"| {cls.__name__} | {clean} of {STEPS} | {beside} | {moved} | {starts} |"


if __name__ == "__main__":
    logging.getLogger("tost_plugins").addHandler(logging.NullHandler())
    kinds = [
        value for name, value in sorted(vars(torch.optim).items()) if isinstance(value, type) and name not in SKIPPED
    ]
    rows = [row(kind) for kind in kinds if issubclass(kind, Optimizer)]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n" + TAIL)
