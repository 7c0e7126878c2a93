"""One of several ranks: trains the norms alone under DDP on its part of each batch; writes FOLDER/<rank>.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from moving_cases import digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session

STEPS = 6


def main(folder: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "train": "norms"}).attach()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with session.drive(optimizer, total_steps=STEPS):
        for x, y in digits(STEPS):
            mine = x.chunk(2)[dist.get_rank()].double(), y.chunk(2)[dist.get_rank()]
            optimizer.zero_grad()
            F.cross_entropy(wrapped(mine[0]), mine[1]).backward()
            optimizer.step()
    torch.save({name: param.detach() for name, param in net.named_parameters()}, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
