"""One of several ranks: trains a session under DDP on its own data, past the end of the ghosts; writes FOLDER/<rank>.pt."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from torch.nn.parallel import DistributedDataParallel
from watch import Watch
from zoo import build, data

from tost_plugins import Session

RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.6},
    "tweaks": [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "6ba"}],
}
STEPS = 8


def main(folder: Path) -> None:
    rank = dist.get_rank()
    net = build("functional").train()
    batches = data("functional", 2 * STEPS)[rank::2]
    session = Session(net, RECIPE).attach()
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    found: dict[str, Any] = {"alphas": [], "norms": [], "outside": [], "untouched": untouched(batches)}
    watch = Watch(counts=True)
    with session.drive(optimizer, batches, total_steps=STEPS):
        found["started"] = state(net)
        found |= look_at_buffers(wrapped, net, batches[0][0], rank)
        for x, y in batches:
            found["alphas"].append(session.metrics()["tost/ghost_skip/alpha"])
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            grads = {name: param.grad for name, param in net.named_parameters()}
            found["outside"] += [name for name, keep in session.mask.items() if bool(grads[name][~keep].any())]
            found["norms"].append(torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5))
            optimizer.step()
            watch(net, optimizer, session)
        found |= {"states": watch.states, "sent": watch.sent}
        found["trained"] = {name: tensor for name, tensor in state(net).items() if "running" not in name}
    found["finished"] = {name: tensor for name, tensor in state(net).items() if "running" not in name}
    found["optimizer"] = {str(i): s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
    torch.save(found, folder / f"{rank}.pt")


def untouched(batches: Any) -> dict[str, int]:
    """The collectives of the same loop without a session."""
    net, watch = build("functional").train(), Watch(counts=True)
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        watch(net, optimizer)
    return watch.sent


def state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def look_at_buffers(wrapped: Any, net: Any, x: torch.Tensor, rank: int) -> dict[str, bool]:
    """What a forward pass of DDP overwrites on rank 1: the ghosts' statistics, as all of BatchNorm's, and no mask."""
    mask, statistics = net.fc.weight_mask, net.block1.bn1.ghost_skip.norm.running_mean
    before = mask.clone()
    if rank == 1:
        mask.logical_not_()
        statistics.fill_(1000.0)
    wrapped(x).sum().backward()
    seen = {"mask stayed": torch.equal(mask, ~before), "statistics came": bool((statistics < 500).all())}
    mask.copy_(before)
    return seen


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
