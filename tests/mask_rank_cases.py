"""For test_mask_ranks.py and its ranks: a network, global batches, and a mask method for each case."""

import torch
from torch import Tensor, nn

from tost_plugins.masks.methods.eoi import Eoi
from tost_plugins.masks.methods.grasp import Grasp
from tost_plugins.masks.methods.magnitude import Magnitude
from tost_plugins.masks.methods.random import Random
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.masks.methods.synflow import SynFlow

Batches = list[tuple[Tensor, Tensor]]


def net(seed: int = 0) -> nn.Module:
    """No norms, and float64: averages over halves are those over the whole, but for the last digits."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))
    return nn.Sequential(*layers).double()


def batches(sizes: list[int]) -> Batches:
    """Global batches, with as many samples of each of the 4 classes in every quarter as there can be."""
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(n, 3, 8, 8, generator=generator).double(), torch.arange(n) % 4) for n in sizes]


def half(given: Batches | None, rank: int, world: int) -> Batches | None:
    """This rank's share: the samples of each batch from its part on; a rank without any has a batch less."""
    if given is None:
        return None
    parts = [(x.tensor_split(world)[rank], y.tensor_split(world)[rank]) for x, y in given]
    return [(x, y) for x, y in parts if len(x)]


def broken(rank: int) -> Batches:
    x, y = batches([8])[0]
    return [(x * float("nan") if rank == 1 else x, y)]


CASES = {
    "random": (Random(sparsity=0.8), None),
    "eoi": (Eoi(sparsity=0.8), None),
    "random_like_snip": (Random(sparsity=0.8, allocation="like:snip"), batches([16, 7])),
    "magnitude": (Magnitude(sparsity=0.8), None),
    "synflow": (SynFlow(sparsity=0.8, rounds=10, input_shape=(3, 8, 8)), None),
    "synflow_batches": (SynFlow(sparsity=0.8, rounds=10), batches([8])),
    "snip": (Snip(sparsity=0.8), batches([16])),
    "snip_uneven": (Snip(sparsity=0.8, batches=4), batches([16, 7, 1])),
    "grasp": (Grasp(sparsity=0.8, per_class=8), batches([16, 16])),
    "grasp_uneven": (Grasp(sparsity=0.8, per_class=50), batches([13, 9])),
}
