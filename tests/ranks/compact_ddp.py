"""One of several ranks: trains compact, and then whole, under DDP on its own data; writes FOLDER/<rank>.pt."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from torch.nn.parallel import DistributedDataParallel
from zoo import build, data

from tost_plugins import Mask, Session
from tost_plugins.channels.slices import slices_of

TWEAKS = [{"kind": "ghost_skip", "until": "2ba"}, {"kind": "soft_activation", "until": "3ba"}]
STEPS = 4


def trained(mask: Mask | None, compact: bool) -> dict[str, Any]:
    net = build("functional").double().train()
    batches = [(x.double(), y) for x, y in data("functional", 2 * STEPS)[dist.get_rank() :: 2]]
    spec = {"mask": {"kind": "synflow", "sparsity": 0.9}, "tweaks": TWEAKS, "compact": compact}
    session = Session(net, spec, mask).attach()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3, momentum=0.9)
    with session.drive(optimizer, batches, total_steps=STEPS):
        parts = sum((s := slices_of(module)) is not None and s.part is not None for module in net.modules())
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    trained = {name: tensor for name, tensor in net.state_dict().items() if "running" not in name}
    return {"parts": parts, "mask": dict(session.mask), "state": trained}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compact = trained(None, True)
    whole = trained(Mask(compact["mask"]), False)
    torch.save({"compact": compact, "whole": whole}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
