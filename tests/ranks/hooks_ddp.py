"""One of several ranks: DDP with communication hooks that make gradients anew, and with a static graph; writes FOLDER/<rank>.pt.

What is clipped, and the gradients that the loop sees, are those of the sparse network.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from zoo import build, data

from tost_plugins import Session

STATIC = {
    "mask": {"kind": "random", "sparsity": 0.6, "allocation": "uniform"},
    "tweaks": [{"kind": "ghost_skip", "until": "3ba"}, {"kind": "soft_activation", "until": "4ba"}],
}
RIGL = {"mask": {"kind": "rigl", "sparsity": 0.6, "every": "3ba", "until": "1dur"}, "tweaks": STATIC["tweaks"]}
CASES = {
    "powersgd": (STATIC, {}),
    "powersgd, views": (STATIC, {"gradient_as_bucket_view": True}),
    "powersgd, static graph": (STATIC, {"static_graph": True}),
    "powersgd, rigl": (RIGL, {}),
    "fp16": (STATIC, {}),
    "static graph": (STATIC, {"static_graph": True}),
    "plain": (STATIC, {}),
}
STEPS = 8


def train(case: str) -> dict[str, Any]:
    recipe, settings = CASES[case]
    net, batches = build("functional").train(), data("functional", 2 * STEPS)[dist.get_rank() :: 2]
    session = Session(net, recipe).attach()
    wrapped = DistributedDataParallel(net, **settings)
    if "powersgd" in case:
        # the gradients of ghosts that lie dormant are 0, which PowerSGD divides by without an epsilon
        power = PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1, orthogonalization_epsilon=1e-8)
        wrapped.register_comm_hook(power, powerSGD_hook)
    elif case == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    norms, sparse, outside = [], [], []
    with session.drive(optimizer, batches, total_steps=STEPS):
        for number, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            if not (recipe is RIGL and number % 3 == 0 and number):  # a step on which the mask moves
                grads = {name: param.grad for name, param in net.named_parameters()}
                outside.append(sum(int(grads[name][~keep].count_nonzero()) for name, keep in session.mask.items()))
            norms.append(torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5).item())
            optimizer.step()
            zeros = sum(
                int(param[~session.mask[name]].count_nonzero()) for name, param in session.weights.weights.items()
            )
            sparse.append(zeros == 0)
    weights = {name: param.detach() for name, param in net.named_parameters()}
    return {"outside": outside, "norms": norms, "sparse": sparse, "weights": weights}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save({case: train(case) for case in CASES}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
