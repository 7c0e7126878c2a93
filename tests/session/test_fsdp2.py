"""FSDP2 on two real ranks: weights in parts train as whole ones do, are saved and loaded, and come out as the plain network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moving_cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tost_plugins import Mask
from tost_plugins.lab.export import export
from tost_plugins.training.params import prunable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))

pytest.importorskip("accelerate")

from fsdp2 import STEPS, Net

Rank = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have written."""
    folder, here = tmp_path_factory.mktemp("fsdp2"), Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, str(here / "ranks/fsdp2.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Rank]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_weights_in_parts_train_as_whole_ones_do_under_ddp(ranks: list[Rank]) -> None:
    for found in (rank["static"] for rank in ranks):
        assert equal(found["mask"], found["plain mask"]) and found["report"] == found["plain report"]
        assert Mask(found["mask"]).sparsity == pytest.approx(0.6, abs=1e-3)
        assert found["weights"].keys() == found["plain weights"].keys()
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, found["plain weights"][name], rtol=1e-12, atol=1e-14)
    assert equal(ranks[0]["static"]["weights"], ranks[1]["static"]["weights"])
    assert not equal(ranks[0]["static"]["weights"], dict(Net().named_parameters()))


def test_after_every_step_nothing_is_left_outside_the_mask(ranks: list[Rank]) -> None:
    for found in (rank["static"] for rank in ranks):
        assert found["outside"] == [0.0] * (STEPS - 1)
        assert len(found["placed"]) == 3 * STEPS and all(found["placed"])
        assert found["whole head"]  # what evaluation leaves behind has not been in the way
        assert found["alphas"] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_the_finished_network_is_the_plain_one(ranks: list[Rank]) -> None:
    found, net = ranks[0]["static"], Net()
    assert found["sharded still"] and list(found["finished"]) == list(net.state_dict())
    net.load_state_dict(found["finished"])
    assert equal(dict(net.named_parameters()), found["weights"])
    assert Mask.from_zeros(prunable(net)) == Mask(found["mask"])


def test_a_whole_state_dict_exports_as_the_plain_network(ranks: list[Rank], folder: Path, tmp_path: Path) -> None:
    for number, rank in enumerate(ranks):
        export(folder / f"plain.{number}.pt", tmp_path / "out.safetensors")
        net, then = Net(), rank["static"]["before the last"]
        net.load_state_dict(load_file(tmp_path / "out.safetensors"))
        assert equal(dict(net.named_parameters()), {name: then[name] for name, _ in net.named_parameters()})
        assert len(then) > len(list(net.parameters()))  # the ghosts were still there


def test_a_distributed_checkpoint_goes_on_bit_for_bit(ranks: list[Rank]) -> None:
    for found in ranks:
        assert equal(found["resumed"]["before"], found["static"]["weights"])
        assert equal(found["resumed"]["within"], found["static"]["weights"])


def test_the_step_that_makes_an_optimizer_s_state_is_none(ranks: list[Rank]) -> None:
    assert [found["static"]["clock"] for found in ranks] == [0, 0]


@pytest.mark.parametrize("case", ["rigl", "set", "snfs", "gradual", "ac_dc"])
def test_masks_move_as_on_one_rank_with_the_whole_batch(ranks: list[Rank], case: str) -> None:
    masks, weights = moving_cases.history(case, moving_cases.Digits(norm=False).double())
    for found in (rank["moving"][case] for rank in ranks):
        assert [Mask(mask) for mask in found["masks"]] == masks and masks[0] != masks[-1]
        for name, value in weights.items():
            torch.testing.assert_close(found["weights"][name], value)


def test_accelerate_s_fsdp2_trains_and_resumes_as_ddp(ranks: list[Rank]) -> None:
    for rank in ranks:
        for found in rank["accelerate"]:
            assert found["sharded"] and equal(found["mask"], rank["static"]["plain mask"])
            for name, value in rank["static"]["plain weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=1e-12, atol=1e-14)
        assert equal(rank["accelerate"][0]["weights"], rank["accelerate"][1]["weights"])


def test_what_cannot_work_is_refused_on_every_rank(ranks: list[Rank]) -> None:
    for found in (rank["refused"] for rank in ranks):
        for kind in ("dnw", "top_kast", "edge_popup"):
            assert found[kind].startswith(f"mask {kind}: expected whole weights on every rank, got FSDP2's parts")
        assert "expected the bare model, got one that is sharded; attach first, then fully_shard" in found["late"]
        assert found["optimizer"].startswith("optimizer: expected one that trains every prunable weight of the model")
        for original in (True, False):
            assert found[f"fsdp1 {original}"].startswith("start: expected DDP or FSDP2, got FullyShardedDataParallel")
        assert "attach first, then fully_shard (FSDP2)" in found["fsdp1 late"]
        assert found["accelerate fsdp1"].startswith("TostHook: expected DDP or FSDP2, got FSDP1")


def test_nan_in_one_part_stops_every_rank(ranks: list[Rank]) -> None:
    here = "step 2: expected finite gradients, got NaN or Inf in head.weight"
    elsewhere = "step 2: expected finite gradients, got NaN or Inf in the parts of other ranks"
    assert ranks[0]["refused"]["nan"].startswith(elsewhere) and ranks[1]["refused"]["nan"].startswith(here)
