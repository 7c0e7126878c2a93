"""One of several ranks: trains recurrent layers under DDP on its part of each batch; writes FOLDER/<rank>.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leave import leave
from recurrent_nets import trained

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(trained(dist.get_world_size(), dist.get_rank()), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
