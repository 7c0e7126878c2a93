"""The `tost` command, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import refused, tost
from safetensors.torch import load_file
from torch.nn.utils import prune

from tost_plugins import Mask, TostError, masks
from tost_plugins.files.locks import alone
from tost_plugins.lab import models
from tost_plugins.recipe.recipe import shipped
from tost_plugins.training.params import prunable

pytest.importorskip("sklearn")

SMALL = [
    "--set", "trainer=torch", "--set", "model=cifar/resnet8", "--set", "data.limit=128", "--set", "duration=2ep",
    "--set", "data.batch_size=64", "--set", "tweaks.2.iterations=1",
]  # fmt: skip


def test_train_leaves_a_plain_sparse_network_that_loads_strict(tmp_path: Path) -> None:
    result = json.loads(tost("train", "quickstart", *SMALL, "--out", tmp_path / "run", "--json"))
    assert result["sparsity"] == pytest.approx(0.95, abs=0.01)
    assert len(result["history"]) == 2
    net = models.build("cifar/resnet8", 10, 1)
    net.load_state_dict(load_file(tmp_path / "run/model.safetensors"), strict=True)
    mask = Mask.load(tmp_path / "run/mask.safetensors")
    for name, weight in net.named_parameters():
        if name in mask:
            assert not weight[~mask[name]].any()
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert torch.__version__.startswith(environment["torch"].split("+")[0])


def test_train_refuses_a_used_folder_and_changes_nothing(tmp_path: Path) -> None:
    tost("train", "quickstart", *SMALL, "--out", tmp_path / "run", "--json")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(TostError, match="--resume"):
        tost("train", "quickstart", *SMALL, "--out", tmp_path / "run")
    with pytest.raises(TostError, match="another one"):
        tost("train", "quickstart", *SMALL, "--set", "seed=5", "--out", tmp_path / "run", "--resume")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_that_was_refused_before_its_first_step_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(TostError, match="expected several rounds"):
        tost("train", "lottery_quickstart", "--out", tmp_path / "run")
    assert (tmp_path / "run/recipe.yaml").exists()
    tost("train", "quickstart", *SMALL, "--out", tmp_path / "run", "--json")
    assert "lottery" not in (tmp_path / "run/recipe.yaml").read_text()


def test_a_folder_is_for_one_command_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    for command in ("train", "lottery", "superpose"):
        recipe = {"train": "quickstart", "lottery": "lottery_quickstart", "superpose": "cifar10_set_95"}[command]
        with alone(tmp_path / command):
            args = (command, recipe, "--out", tmp_path / command, "--resume")
            refused(lambda args=args: tost(*args), f"--out {tmp_path / command}", "got one that is in use")
        assert [path.name for path in (tmp_path / command).iterdir()] == ["lock"]


def test_compare_uses_one_mask_and_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = ["compare", "quickstart", *SMALL, "--seeds", "2", "--out", str(tmp_path / "c"), "--json"]
    result = json.loads(tost(*args))
    assert [row["seed"] for row in result["rows"]] == [0, 1]
    for row in result["rows"]:
        assert row["difference"] == pytest.approx(row["tost"] - row["plain"])
        masks = [
            Mask.load(tmp_path / f"c/{variant}-seed{row['seed']}/mask.safetensors") for variant in ("plain", "tost")
        ]
        assert masks[0] == masks[1]
    assert result["mean"]["plain"] == pytest.approx(sum(row["plain"] for row in result["rows"]) / 2)
    assert (tmp_path / "c/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(tost(*args, "--resume"))["rows"] == result["rows"]


def test_compare_lets_masks_that_move_go_their_own_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    moving = ["--set", "mask={kind: rigl, sparsity: 0.9, every: 1ba}", "--seeds", "1", "--out", str(tmp_path), "--json"]
    assert len(json.loads(tost("compare", "quickstart", *SMALL, *moving))["rows"]) == 1
    masks = [Mask.load(tmp_path / f"{variant}-seed0/mask.safetensors") for variant in ("plain", "tost")]
    assert masks[0] != masks[1] and masks[0].kept == masks[1].kept


def test_mask_find_is_the_mask_that_training_uses(tmp_path: Path) -> None:
    found = json.loads(tost("mask", "find", "quickstart", tmp_path / "m.safetensors", *SMALL, "--json"))
    tost("train", "quickstart", *SMALL, "--out", tmp_path / "run", "--json")
    assert Mask.load(tmp_path / "m.safetensors") == Mask.load(tmp_path / "run/mask.safetensors")
    assert found["kept"] == sum(layer["kept"] for layer in found["layers"])


def test_mask_convert_and_inspect_read_a_pruning_state_dict(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    prune.l1_unstructured(net[0], "weight", amount=12)
    prune.l1_unstructured(net[2], "weight", amount=4)
    torch.save(net.state_dict(), tmp_path / "pruned.pt")
    tost("mask", "convert", tmp_path / "pruned.pt", tmp_path / "m.safetensors")
    assert Mask.load(tmp_path / "m.safetensors").kept == 8
    assert "8 of 24" in tost("mask", "inspect", tmp_path / "m.safetensors")


def test_a_mask_is_not_written_under_the_name_of_another_kind_of_file(tmp_path: Path) -> None:
    Mask({"weight": torch.tensor([[1, 0]])}).save(tmp_path / "m.safetensors")
    for command in (("convert", tmp_path / "m.safetensors"), ("find", "quickstart")):
        wanted = "expected a name for a .safetensors file, got one that ends in .npz (np.savez(path, **mask) writes one"
        refused(lambda: tost("mask", *command, tmp_path / "o.npz"), wanted, "; write o.safetensors")  # noqa: B023
        assert not (tmp_path / "o.npz").exists()


def test_a_mask_under_a_name_of_torch_save_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tost_plugins")
    Mask({"weight": torch.tensor([[1, 0]])}).save(tmp_path / "m.pt")
    assert caplog.text.count("m.pt: is written as .safetensors") == 1 and Mask.load(tmp_path / "m.pt").kept == 1


def test_mask_inspect_shows_what_a_mask_connects(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = models.build("cifar/resnet8", 10)
    mask = Mask.dense(prunable(net))
    mask = Mask({**mask, "stage3.0.conv2.weight": torch.zeros_like(mask["stage3.0.conv2.weight"])})
    mask.save(tmp_path / "m.safetensors")
    args = ("mask", "inspect", tmp_path / "m.safetensors", "--model", "cifar/resnet8")
    found = json.loads(tost(*args, "--json"))
    rows = {row["layer"]: row for row in found["layers"]}
    lost = rows["stage3.0.conv1.weight"]  # nobody reads the branch that ends in the empty layer
    assert (lost["kept"], lost["live"], lost["channels"], lost["dead_channels"], lost["unread"]) == (
        18432,
        0,
        64,
        64,
        64,
    )
    assert (
        found["connected"]
        and found["live"] == found["kept"] - 18432 == masks.live(net, mask, torch.ones(1, 3, 32, 32)).kept
    )
    assert found["effective_sparsity"] == pytest.approx(1 - found["live"] / found["size"])
    assert "live, effective sparsity" in " ".join(tost(*args, "--picture", tmp_path / "p.png").split())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    net = models.build("cifar/resnet8", 10, in_channels=1)
    Mask.dense(prunable(net)).save(tmp_path / "d.safetensors")
    digits = json.loads(tost("mask", "inspect", tmp_path / "d.safetensors", "--recipe", "quickstart", "--json"))
    assert digits["connected"] and digits["live"] <= digits["kept"] == sum(
        param.numel() for param in prunable(net).values()
    )


def test_recipes_list_show_schema() -> None:
    assert {row["name"] for row in json.loads(tost("recipes", "list", "--json"))} == set(shipped())
    shown = json.loads(tost("recipes", "show", "cifar10_snip_98", "--set", "mask.sparsity=0.5", "--json"))
    assert shown["mask"]["sparsity"] == 0.5 and shown["duration"] == "182ep"
    words = tost("recipes", "list").split()  # 80 columns wide, and no name is cut off or broken
    assert set(shipped()) <= set(words)
    schema = json.loads(tost("recipes", "schema"))
    assert schema["additionalProperties"] is False and "mask" in schema["required"]


def test_an_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tost_plugins",
        "train",
        "quickstart",
        "--set",
        "mask.sparsity=98",
        "--out",
        tmp_path / "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "tost: recipe quickstart: mask.sparsity: expected a sparsity in [0, 1), got 98.0; 98 % is written 0.98"
    ]
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").touch()
    command = [sys.executable, "-m", "tost_plugins", "train", "quickstart", "--out", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"tost: {tmp_path / 'x'}: expected a place to read and write, got 'File exists'; another --out, more room on the disk?"
    )


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; sys.argv=['tost','--help']\ntry:\n import tost_plugins.lab.cli as c; c.main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("False"), done.stdout + done.stderr


def test_ctrl_c_leaves_a_checkpoint_that_resume_continues(tmp_path: Path) -> None:
    small = [*SMALL, "--set", "duration=40ep"]
    command = [sys.executable, "-m", "tost_plugins", "train", "quickstart", *small, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    history = tmp_path / "run/history.jsonl"
    while process.poll() is None and not (history.exists() and history.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "--resume" in stderr
    resumed = json.loads(tost("train", "quickstart", *small, "--out", tmp_path / "run", "--resume", "--json"))
    whole = json.loads(tost("train", "quickstart", *small, "--out", tmp_path / "whole", "--json"))
    assert [row["loss"] for row in resumed["history"]] == [row["loss"] for row in whole["history"]]
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
