"""One of several ranks: goes on with the runs in FOLDER/one, leaves halves of runs in FOLDER/several, for each trainer named,
and writes what came out to FOLDER/<rank>.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leave import leave
from resize_cases import run

if __name__ == "__main__":
    folder, trainers = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    found = {}
    for trainer in trainers:
        found[trainer, "resumed"] = run(trainer, folder / "one" / trainer, second=True)
        found[trainer, "begun"] = run(trainer, folder / "several" / trainer, second=False)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()
