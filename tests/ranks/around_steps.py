"""One of two ranks: both tweaks that act around steps, under DDP, with weights in parts (FSDP2), and with an optimizer whose
state the ranks share among them; writes FOLDER/<rank>.pt. All in float64, as fsdp2.py says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from moving_cases import MOVING, digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session

STEPS = 8
TWEAKS = ["neuron_gradients", {"kind": "multiplicative", "warmup": "4ba"}]
SET = {"kind": "random", "sparsity": 0.6}


class Net(nn.Module):
    """Seven channels do not divide by two; a transposed convolution, whose neurons lie across the parts, in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(1, 7, 3)
        self.up = nn.ConvTranspose2d(7, 6, 3)
        self.wide = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.head = nn.Linear(4, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.first(x))))
        return self.head(F.relu(self.wide(x)).mean((2, 3)))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def shared(params: Any) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.05, momentum=0.9)


def train(mask: dict, wrap: Callable[[nn.Module], Any], made: Any = sgd, tweaks: Any = TWEAKS) -> dict[str, Tensor]:
    net = Net()
    session = Session(net, {"mask": mask, "tweaks": tweaks}).attach()
    model = wrap(net)
    optimizer = made(model.parameters())
    half: Any = lambda batch: [part.chunk(2)[dist.get_rank()] for part in batch]  # noqa: E731
    with session.drive(optimizer, total_steps=STEPS):
        for x, y in map(half, digits(STEPS)):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
    weights = dict(net.named_parameters())
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone() for n, w in weights.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "ddp": train(SET, DistributedDataParallel),
        "without": train(SET, DistributedDataParallel, tweaks=[]),
        "fsdp2": train(SET, fully_shard),
        "zero": train(SET, DistributedDataParallel, shared),
        "rigl": train(MOVING["rigl"], DistributedDataParallel),
        "rigl fsdp2": train(MOVING["rigl"], fully_shard),
    }
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
