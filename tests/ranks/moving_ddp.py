"""One of several ranks: trains masks that move under DDP on its part of each batch; writes FOLDER/<rank>.pt."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from moving_cases import MOVING, Digits, digits, history
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session
from tost_plugins.training import seeds
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable

Batch = tuple[Tensor, Tensor]


def part(batch: Batch) -> Batch:
    """This rank's samples."""
    return batch[0].chunk(dist.get_world_size())[dist.get_rank()], batch[1].chunk(dist.get_world_size())[
        dist.get_rank()
    ]


def with_local_gradients(net: nn.Module, session: Session, batch: Batch) -> dict[str, Tensor]:
    """RigL's mask at step 2, if it were to look at this rank's gradient alone."""
    alone = copy.deepcopy(net)
    x, y = part(batch)
    F.cross_entropy(alone(x.double()), y).backward()
    grads = {name: param.grad for name, param in prunable(alone).items() if param.grad is not None}
    weights = {name: param.detach() for name, param in prunable(alone).items()}
    return session.moving.update(session.mask, weights, grads, Clock(2), seeds.generator(0, 2))


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for case in MOVING:
        for parts in (1, 2):
            net = Digits(norm=False).double()
            if dist.get_rank() == 1:
                net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})  # DDP sends rank 0's

            def look(step: int, session: Session, net: nn.Module = net, case: str = case) -> None:
                if step == 2 and case == "rigl":
                    found["local"] = with_local_gradients(net, session, digits(3)[2])

            masks, weights = history(case, net, DistributedDataParallel, part, parts, look)
            found[f"{case} in {parts}"] = {"masks": [dict(mask) for mask in masks], "weights": weights}
    torch.save(found, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
