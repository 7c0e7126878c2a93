"""`tost export` of a run: compact, packed, for ONNX Runtime and for torch.export, each the network that was trained."""

import json
from pathlib import Path

import pytest
import torch
from command import refused, tost
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tost_plugins import Recipe, TostError, load_packed
from tost_plugins.lab import data, models
from tost_plugins.lab.export_formats import write_onnx, write_pt2
from tost_plugins.lab.train import train
from tost_plugins.recipe.recipe import DataSpec

RECIPE = {
    "mask": {"kind": "synflow", "sparsity": 0.9, "rounds": 5}, "model": "cifar/resnet8",
    "data": {"limit": 96, "batch_size": 32}, "duration": "1ep",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("run") / "run"
    train(Recipe.from_dict(RECIPE), folder)
    return folder


def built() -> nn.Module:
    return models.build("cifar/resnet8", 10, 1).eval()


@pytest.fixture(scope="module")
def trained(run: Path) -> nn.Module:
    net = built()
    net.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    return net


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load(DataSpec()).test.images[:9].float() / 8 - 1


def export(run: Path, name: str, *options: str) -> tuple[Path, dict]:
    target = run.parent / name
    said = json.loads(tost("export", run, target, *options, "--json"))
    assert said["bytes"] == target.stat().st_size and not list(run.parent.glob("*.tmp"))
    return target, said


@pytest.mark.parametrize("options", [["--compact"], ["--packed"], ["--compact", "--packed"]])
def test_files_for_load_packed(run: Path, trained: nn.Module, images: Tensor, options: list[str]) -> None:
    path, said = export(run, "net.safetensors", *options)
    loaded = load_packed(built(), path).eval()
    torch.testing.assert_close(loaded(images), trained(images), rtol=1e-4, atol=1e-4)
    if "--compact" in options:
        assert said["parameters"] == sum(param.numel() for param in loaded.parameters()) < 0.85 * 77_754
    assert said["bytes"] < (run / "model.safetensors").stat().st_size / (1.1 if options == ["--compact"] else 4)
    if options == ["--packed"]:
        assert all(bool((tensor == trained.state_dict()[name]).all()) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("options", [["--onnx"], ["--onnx", "--compact"]])
def test_onnx_runtime_says_the_same(run: Path, trained: nn.Module, images: Tensor, options: list[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, said = export(run, "net.onnx", *options)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), trained(batch), rtol=1e-4, atol=1e-4)
    assert 0 <= said["difference"] < 1e-4
    assert (said["parameters"] < 77_754) == ("--compact" in options)


@pytest.mark.parametrize("options", [["--pt2"], ["--pt2", "--compact"]])
def test_torch_export_says_the_same(run: Path, trained: nn.Module, images: Tensor, options: list[str]) -> None:
    path, said = export(run, "net.pt2", *options)
    with path.open("rb") as file:
        net = torch.export.load(file).module()
    for batch in (images, images[:1]):
        torch.testing.assert_close(net(batch), trained(batch), rtol=1e-4, atol=1e-4)
    assert (said["parameters"] < 77_754) == ("--compact" in options)


class Undecided(nn.Module):
    """Takes another way for other numbers, which no exported graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Chance(nn.Module):
    """Says something else each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize("write", [write_onnx, write_pt2])
def test_what_cannot_be_followed_or_is_not_the_same_leaves_no_file(write, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for net, reason in ((Undecided(), "torch.export can follow"), (Chance(), "expected the logits of PyTorch")):
        refused(lambda net=net: write(tmp_path / "net", net, torch.randn(3, 2)), reason)
    assert list(tmp_path.iterdir()) == []


def test_what_a_recipe_has_to_say_is_refused_without_it(run: Path, tmp_path: Path) -> None:
    save_file(load_file(run / "model.safetensors"), tmp_path / "model.safetensors")
    refused(
        lambda: tost("export", tmp_path, tmp_path / "a", "--compact"), "expected a run's folder with its recipe.yaml"
    )
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("resnet8", "resnet14"))
    refused(lambda: tost("export", tmp_path, tmp_path / "a", "--pt2"), "expected the weights of cifar/resnet14")
    refused(lambda: tost("export", run, tmp_path / "a", "--pt2", "--onnx"), "expected one of --onnx, --pt2, --packed")
    path, _ = export(run, "packed.safetensors", "--packed")
    refused(lambda: tost("export", path, tmp_path / "a"), "load it with tost_plugins.load_packed")
    assert not (tmp_path / "a").exists()


def test_data_that_are_gone_leave_random_images(
    run: Path, tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tost_plugins")
    Recipe.from_dict(RECIPE | {"data": {"name": "cifar10", "path": str(tmp_path / "gone")}}).to_yaml(
        tmp_path / "recipe.yaml"
    )
    save_file(load_file(run / "model.safetensors"), tmp_path / "model.safetensors")
    path, _ = export(tmp_path, "a.safetensors", "--compact")
    assert "compared on random images" in caplog.text
    with pytest.raises(TostError):
        load_packed(models.build("cifar/resnet8", 9, 1), path)
    load_packed(built(), path)(images)
