"""One of several ranks: learns scales on its own half of the data and writes them to FOLDER/<rank>.json."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import rescale


def network() -> nn.Module:
    """The same small network everywhere; no BatchNorm, whose statistics would differ from rank to rank."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.mul_(4)
    return net


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches of 4 samples that only this rank has."""
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(3)]


def learn(data: list, norm: float) -> dict[str, float]:
    """The scales for these batches."""
    net = network()
    mask = {"0.weight": torch.arange(48).view(8, 6) % 3 != 0}
    return rescale(Task.of(net, batches=data), mask, iterations=8, learning_rate=0.05, norm=norm)


if __name__ == "__main__":
    from leave import leave  # beside this script; the test imports it from elsewhere

    dist.init_process_group("gloo")
    found = [learn(batches(dist.get_rank()), norm) for norm in (1e-6, 1.5, float("inf"))]
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()
