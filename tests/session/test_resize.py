"""A run that was started on one rank goes on with two, and the other way round: its mask and schedules with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resize_cases import MIDDLE, STEPS, run

from tost_plugins import Mask

RANK = Path(__file__).resolve().parents[1] / "ranks" / "resize.py"
ALPHAS = [1 - step / 5 for step in range(1, STEPS)] + [0.0]  # after each step: down to 0 at 5ba


@pytest.mark.parametrize(
    "trainers",
    [("torch", "accelerate"), pytest.param(("transformers", "composer", "lightning"), marks=pytest.mark.long)],
    ids="-".join,
)
def test_one_rank_goes_on_as_two_and_two_as_one(tmp_path: Path, trainers: tuple[str, ...]) -> None:
    for trainer in trainers:
        if trainer != "torch":
            pytest.importorskip(trainer)
    begun = {}
    for trainer in trainers:
        for where in ("one", "several"):
            (tmp_path / where / trainer).mkdir(parents=True)
        begun[trainer] = run(trainer, tmp_path / "one" / trainer, second=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(map(str, (RANK.parents[2], RANK.parents[1])))
    done = subprocess.run(
        [*command, str(RANK), str(tmp_path), *trainers],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NODE_RANK": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for trainer in trainers:
        ends = [found[trainer, "resumed"] for found in (first, second)]
        ends.append(run(trainer, tmp_path / "several" / trainer, second=True))
        starts = [begun[trainer], begun[trainer], first[trainer, "begun"]]
        for start, end in zip(starts, ends, strict=True):
            assert start["alphas"] == pytest.approx(ALPHAS[:MIDDLE]), trainer
            assert end["alphas"] == pytest.approx(ALPHAS[MIDDLE:]), trainer
            assert end["outside"] == 0 and end["plain"], trainer
            before, after = Mask(start["mask"]), Mask(end["mask"])
            assert before.kept == after.kept and before != after, trainer  # it has moved once more, at step 4
            assert before.overlap(after) > 0.3, trainer  # not a new one
        for name, weight in ends[0]["weights"].items():
            assert torch.equal(weight, ends[1]["weights"][name]), (trainer, name)
        assert Mask(ends[0]["mask"]) == Mask(ends[1]["mask"]), trainer
