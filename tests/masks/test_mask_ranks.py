"""Masks on two real processes: both hold the same mask, and it is the one that a single process finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mask_rank_cases import CASES, net

from tost_plugins.masks import Mask, find

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "ranks" / "masks.py"), str(folder)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_mask_of_one_rank_with_the_global_batch(name: str, results: Path) -> None:
    method, batches = CASES[name]
    alone = find(net(), method, batches=batches)
    assert Mask.load(results / f"{name}.0.safetensors") == alone
    assert Mask.load(results / f"{name}.1.safetensors") == alone


def test_ranks_that_differ_get_the_mask_of_rank_0(results: Path) -> None:
    alone = find(net(), CASES["magnitude"][0])
    assert alone != find(net(seed=1), CASES["magnitude"][0])
    assert Mask.load(results / "apart.0.safetensors") == alone == Mask.load(results / "apart.1.safetensors")


def test_a_loss_that_is_not_finite_on_one_rank_is_an_error_on_all(results: Path) -> None:
    for rank in (0, 1):
        assert "expected finite numbers, got NaN or infinity in the loss" in (results / f"error.{rank}").read_text()
