"""Networks by name: their sizes, what they accept, and what is said of a name that no source knows."""

import importlib

import pytest
import torch
from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.lab import models

# At 10 classes. ResNets: option-B shortcuts add 2,752 to He et al.'s option A (resnet20: 269,722).
# VGG-16 has no biases beside its norms (14,728,266 with them).
PARAMETERS = {
    "cifar/resnet8": 78_042,
    "cifar/resnet14": 175_258,
    "cifar/resnet18": 11_173_962,
    "cifar/resnet20": 272_474,
    "cifar/resnet32": 1_860_522,
    "cifar/resnet44": 661_338,
    "cifar/resnet56": 855_770,
    "cifar/resnet110": 1_730_714,
    "cifar/vgg16": 14_724_042,
    "cifar/vgg16_slim": 923_130,
    "cifar/mobilenet_v2": 2_296_922,
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def message(*args: object) -> str:
    with pytest.raises(TostError) as caught:
        models.build(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_all_known() -> None:
    assert sorted(models.names()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_size(name: str) -> None:
    assert size(models.build(name, 10)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["cifar/resnet8", "cifar/resnet18", "cifar/vgg16", "cifar/mobilenet_v2"])
@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_any_image_size(name: str, side: int) -> None:
    logits = models.build(name, 7, in_channels=1)(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["cifar/resnet20", "cifar/vgg16", "cifar/mobilenet_v2"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = models.build(name, 10)
    model(torch.randn(4, 3, 16, 16)).logsumexp(1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_values_follow_the_global_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.build("cifar/resnet8", 10).state_dict()["stage2.0.conv1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_kaiming_scale() -> None:
    weight = models.build("cifar/resnet18", 10).state_dict()["stage4.1.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("cifar/resnet20", nn.ReLU, 19), ("cifar/vgg16", nn.ReLU, 13), ("cifar/mobilenet_v2", nn.ReLU6, 36)],
)
def test_each_activation_is_a_module_used_once(name: str, kind: type[nn.Module], count: int) -> None:
    """Tweaks swap activations one by one: a shared or a functional one would escape or be counted twice."""
    model = models.build(name, 10)
    used: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, *_: used.append(module))
    model(torch.randn(2, 3, 8, 8))
    assert len(used) == len(set(used)) == count


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    assert size(models.build("torchvision/resnet18", 10)) == 11_181_642


def test_torchvision_gives_logits_while_training() -> None:
    pytest.importorskip("torchvision")
    assert models.build("torchvision/googlenet", 10).train()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_timm() -> None:
    pytest.importorskip("timm")
    for name in ("resnet10t", "resnet10t.c3_in1k"):
        assert models.build(f"timm/{name}", 10, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_unknown_names() -> None:
    known = ", ".join(sorted([*models.names(), "timm/NAME", "torchvision/NAME"]))
    assert message("resnet20", 10) == (
        f"model: expected a known model, got 'resnet20'; did you mean 'cifar/resnet20'? known: {known}"
    )
    assert "got 'cifar/resnet50'; did you mean 'cifar/resnet56'? known: cifar/" in message("cifar/resnet50", 10)
    assert "got 'cifar/'; " in message("cifar/", 10)
    assert "got 'os/system'; " in message("os/system", 10)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_unknown_name_of_a_package(source: str) -> None:
    pytest.importorskip(source)
    said = message(f"{source}/resnet19", 10)
    assert said.startswith(f"model: expected a known {source} model, got 'resnet19'; nearest of ")
    assert f" {source}/resnet18" in said
    assert "fasterrcnn" not in said


def test_timm_fetches_nothing() -> None:
    pytest.importorskip("timm")
    assert "got 'hf-hub:timm/resnet10t.c3_in1k'" in message("timm/hf-hub:timm/resnet10t.c3_in1k", 10)


def test_wrong_numbers() -> None:
    assert message("cifar/resnet8", 1) == ("model: expected at least 2 classes, got 1; check the data's labels")
    assert message("cifar/resnet8", 10, 0) == (
        "model: expected at least 1 input channel, got 0; grey images have 1, colour images 3"
    )


def test_torchvision_takes_three_channels() -> None:
    pytest.importorskip("torchvision")
    assert message("torchvision/resnet18", 10, 1) == (
        "model: expected 3 input channels for 'torchvision/resnet18', got 1; "
        "use cifar/... or timm/..., which take any number"
    )


@pytest.mark.parametrize(
    ("source", "install"), [("torchvision", "pip install 'tost_plugins[vision]'"), ("timm", "pip install 'timm'")]
)
def test_missing_package(source: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {source!r}", name=source)

    monkeypatch.setattr(importlib, "import_module", absent)
    said = message(f"{source}/resnet18", 10)
    assert said.startswith(f"model: expected the package {source!r}, got ")
    assert said.endswith(f"; run: {install}")
    models.build("cifar/resnet8", 10)  # needs no package
