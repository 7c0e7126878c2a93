"""A checkpoint of any trainer -> the plain network."""

import argparse
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tost_plugins import Recipe, Session, TostError
from tost_plugins.files.pickles import load
from tost_plugins.lab import models
from tost_plugins.lab.export import export
from tost_plugins.lab.train import train

RECIPE = {
    "mask": {"kind": "random", "sparsity": 0.8},
    "tweaks": [{"kind": "ghost_skip", "until": "2ba"}, {"kind": "soft_activation", "until": "3ba"}],
    "model": "cifar/resnet8", "data": {"limit": 96, "batch_size": 32}, "duration": "2ep",
}  # fmt: skip
FRAMEWORK = {"torch": None, "composer": "composer", "transformers": "transformers", "accelerate": "accelerate",
             "lightning": "lightning"}  # fmt: skip


def attached_after(steps: int) -> torch.nn.Module:
    """A network with its session, stopped after some steps of random gradients."""
    torch.manual_seed(0)
    net = models.build("cifar/resnet8", 10, 1)
    session = Session(net, {key: RECIPE[key] for key in ("mask", "tweaks")}).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session.start(optimizer, total_steps=6)
    for _ in range(steps):
        net(torch.randn(4, 1, 8, 8)).sum().backward()
        session.before_step()
        optimizer.step()
        optimizer.zero_grad()
        session.after_step()
    return net


@pytest.mark.parametrize("trainer", FRAMEWORK)
def test_the_last_checkpoint_of_each_trainer_gives_the_final_network(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    if FRAMEWORK[trainer]:
        pytest.importorskip(FRAMEWORK[trainer])
    train(Recipe.from_dict(RECIPE | {"trainer": trainer}), tmp_path / "run")
    final = load_file(tmp_path / "run/model.safetensors")
    (tmp_path / "run/model.safetensors").unlink()
    done = export(tmp_path / "run", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    models.build("cifar/resnet8", 10, 1).load_state_dict(plain, strict=True)
    assert plain.keys() == final.keys()
    assert all(torch.equal(plain[name], final[name]) for name in final)
    assert done["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_a_damaged_mask_in_a_folder_above_is_nobody_s_business(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "mask.safetensors").write_text("of something else, and torn")
    save_file({"w": torch.tensor([[0.0, 0.7]])}, tmp_path / "a/net.safetensors")
    assert export(tmp_path / "a/net.safetensors", tmp_path / "out.safetensors")["sparsity"] == 0.5


def test_checkpoints_of_public_scripts_are_read_with_the_arguments_in_them(tmp_path: Path) -> None:
    """torchvision's references save their argparse.Namespace, others paths and numbers of numpy, also of numpy 1."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    args = argparse.Namespace(lr=0.1, output_dir=Path("runs"), best=np.float32(0.5))
    content = {
        "model": net.state_dict(), "args": args, "best_acc1": np.float64(71.5), "epoch": np.int64(3), "done": np.bool_(True),
        "history": np.arange(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "new.pth")
    loaded = load(tmp_path / "new.pth")
    assert (
        loaded["args"].lr == 0.1 and loaded["args"].output_dir == PurePosixPath("runs") and loaded["args"].best == 0.5
    )
    assert (loaded["best_acc1"], loaded["epoch"], loaded["done"]) == (71.5, 3, True)
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.infolist():
            old.writestr(entry.filename, new.read(entry).replace(b"numpy._core", b"numpy.core"))
    for name in ("new", "old"):
        export(tmp_path / f"{name}.pth", tmp_path / "plain.safetensors")
        assert {*load_file(tmp_path / "plain.safetensors")} == {*net.state_dict()}


def test_ghosts_at_work_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    torch.save(attached_after(1).state_dict(), tmp_path / "live.pt")
    with pytest.raises(TostError, match=r"ghosts have ended.*--unfinished"):
        export(tmp_path / "live.pt", tmp_path / "plain.safetensors")
    assert not (tmp_path / "plain.safetensors").exists()
    export(tmp_path / "live.pt", tmp_path / "plain.safetensors", unfinished=True)
    models.build("cifar/resnet8", 10, 1).load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=True)


def test_a_soft_activation_at_work_is_refused_too(tmp_path: Path) -> None:
    torch.save(attached_after(2).state_dict(), tmp_path / "soft.pt")
    with pytest.raises(TostError, match="tost_beta"):
        export(tmp_path / "soft.pt", tmp_path / "plain.safetensors")
    torch.save(attached_after(3).state_dict(), tmp_path / "done.pt")
    export(tmp_path / "done.pt", tmp_path / "plain.safetensors")


def test_wrappers_prefixes_go_and_masks_are_applied(tmp_path: Path) -> None:
    weight, mask = torch.ones(2, 2), torch.tensor([[True, False], [False, False]])
    save_file({"module.fc.weight": weight, "module.fc.weight_mask": mask}, tmp_path / "c.safetensors")
    done = export(tmp_path / "c.safetensors", tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors")["fc.weight"].tolist() == [[1, 0], [0, 0]]
    assert done["sparsity"] == 0.75


def test_a_mask_without_its_weight_is_an_error(tmp_path: Path) -> None:
    save_file({"fc.weight_mask": torch.ones(2, 2).bool(), "x": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(TostError, match="not whole"):
        export(tmp_path / "c.safetensors", tmp_path / "plain.safetensors")


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(TostError, match="neither"):
        export(tmp_path, tmp_path / "plain.safetensors")
