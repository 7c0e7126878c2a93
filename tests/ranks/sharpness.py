"""One of two ranks: trains uphill under DDP and FSDP2 on half of each batch, and alone on all of it; writes FOLDER/<rank>.pt."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from moving_cases import Digits, digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session

STEPS = 6
SHARP = {"kind": "sharpness", "rho": 0.3}


def trained(wrap: Callable[[nn.Module], Any], halves: bool, tweaks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All weights after the last step, in whole."""
    net = Digits(norm=False).double()
    recipe = {"mask": {"kind": "eoi", "sparsity": 0.6}, "tweaks": [{"kind": "sparse_init"}, *tweaks]}
    session = Session(net, recipe).attach()
    wrapped = wrap(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    with session.drive(optimizer, digits(STEPS), total_steps=STEPS):
        for x, y in digits(STEPS):
            if halves:
                x, y = (part.chunk(2)[dist.get_rank()] for part in (x, y))
            with torch.no_grad():
                wrapped.eval()(x.double())  # leaves the root of FSDP2 whole
                wrapped.train()
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x.double()), y).backward()
            optimizer.step()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in net.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "ddp": trained(DistributedDataParallel, True, [SHARP]),
        "fsdp2": trained(fully_shard, True, [SHARP]),
        "alone": trained(lambda net: net, False, [SHARP]),
        "plain": trained(lambda net: net, False, []),
    }
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
