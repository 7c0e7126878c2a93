"""Two ranks that share the optimizer's parameters among them: the same training as without, under every kind of mask."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moving_cases import Digits, digits
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session, TostError

STEPS = 9
MASKS = {
    "random": {"kind": "random", "sparsity": 0.6},
    "set": {"kind": "set", "sparsity": 0.6, "every": "2ba", "until": "0.9dur"},
    "rigl": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "0.9dur"},
    "dnw": {"kind": "dnw", "sparsity": 0.6},
}


def train(shared: bool, mask: dict) -> dict[str, torch.Tensor]:
    net = Digits()
    session = Session(net, {"mask": mask}).attach()
    model = DistributedDataParallel(net)
    if shared:
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01)
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with session.drive(optimizer, digits(1), total_steps=STEPS):
        for x, y in digits(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert session.clock.step == STEPS
    return net.state_dict()


def too_early() -> str:
    """What is said to one that was made before there were ghosts."""
    net = Digits()
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01)
    try:
        Session(net, {"mask": MASKS["random"], "tweaks": ["ghost_skip"]}).attach(optimizer)
    except TostError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {kind: (train(False, mask), train(True, mask)) for kind, mask in MASKS.items()}
    torch.save({"runs": found, "early": too_early()}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
