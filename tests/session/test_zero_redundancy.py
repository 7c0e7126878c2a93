"""ZeroRedundancyOptimizer on two real ranks, each of which keeps the state of some parameters only."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def test_ranks_that_share_an_optimizers_state_train_as_ranks_that_do_not(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(here / "ranks/zero_redundancy.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for plain, shared in found["runs"].values():
            assert all(torch.equal(value, shared[name]) for name, value in plain.items())
        assert "optimizer: expected one that is made after attach" in found["early"]
