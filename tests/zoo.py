"""Networks of every style that the library promises to work with, small enough to be run by the hundred.

Each entry says by hand how many of its convolutions are spatial and not the stem; nothing here asks the library.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


class Entry(NamedTuple):
    """How to build a network, one sample's shape, and the number of its spatial convolutions without the stem."""

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    spatial: int


def build(name: str) -> nn.Module:
    """A fresh copy of a network of the zoo, always with the same weights; skips where its package is missing."""
    return copy.deepcopy(_built(name))


def inputs(name: str, batch: int = 2) -> Tensor:
    """Images for it, always the same."""
    return torch.randn(batch, *ZOO[name].sample, generator=torch.Generator().manual_seed(1))


def logits(net: nn.Module, x: Tensor) -> Tensor:
    """What the network says, however it returns it."""
    out: Any = net(x)
    return out if isinstance(out, Tensor) else out.logits


def data(name: str, count: int = 3, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels, always the same."""
    generator = torch.Generator().manual_seed(2)
    shape = ZOO[name].sample
    return [
        (
            torch.randn(batch, *shape, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ZOO[name].make()
        # Norms as after some training: where they are the identity, an error could hide.
        for module in net.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


# ---- of libraries


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(num_classes=CLASSES)


def _vgg(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):  # its own classifier has 120 million weights
            net = getattr(models, name)(num_classes=CLASSES, init_weights=False)
            net.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, CLASSES))
        net.to_empty(device="cpu")
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return net

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=CLASSES)


def _timm_fused() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    blocks = [layers.ConvNormAct(i, 6, 3, stride, act_layer=nn.ReLU) for i, stride in ((3, 1), (6, 2), (6, 1))]
    return nn.Sequential(*blocks, Pool(), nn.Linear(6, CLASSES))


def _transformers_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


# ---- of users


class Block(nn.Module):
    """A residual block that calls relu as a function, spelled in one of three ways."""

    def __init__(self, inputs: int, outputs: int, stride: int, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.shortcut is None else self.shortcut(x)))


def method_relu(x: Tensor) -> Tensor:
    return x.relu()


class FunctionalResNet(nn.Module):
    """Without one nn.ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.block1 = Block(6, 6, 1, F.relu)
        self.block2 = Block(6, 8, 2, torch.relu)
        self.block3 = Block(8, 8, 1, method_relu)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean((2, 3)))


class SeparateLists(nn.Module):
    """Convolutions in one list, their norms in another, which comes first and in the opposite order."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(i, 6, 3, 1, 1, bias=False) for i in (3, 6, 6, 6))
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, reversed(self.norms), strict=True):
            x = self.act(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """Norms stand before their convolutions: what a convolution returns is added, and no norm reads it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, 1, 1) for _ in range(3))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x).relu())
        return self.fc(x.mean((2, 3)))


class SharedConvolution(nn.Module):
    """One convolution used at two places, each with a norm of its own, and one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.shared = nn.Conv2d(6, 6, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.twice = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.fc(self.twice(self.twice(x)).mean((2, 3)))


class Pool(nn.Module):
    """The mean over all places, for images, signals and volumes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ReLU(),
        Pool(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def _depthwise() -> nn.Module:
    def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
        ]  # fmt: skip

    stem = [nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()]
    return nn.Sequential(*stem, *separable(6, 8, 1), *separable(8, 8, 2), Pool(), nn.Linear(8, CLASSES))


def _odd() -> nn.Module:
    convs = [
        nn.Conv2d(3, 4, 3),  # the stem
        nn.Conv2d(4, 6, 5, stride=2),
        nn.Conv2d(6, 6, 4, padding=1),
        nn.Conv2d(6, 6, 3, dilation=2),
        nn.Conv2d(6, 6, 3, padding=3),
        nn.Conv2d(6, 6, (1, 3), padding="same"),
        nn.Conv2d(6, 6, 3, stride=3, padding=1, groups=2, padding_mode="circular"),
        nn.Conv2d(6, 6, 2, stride=2, bias=False),
    ]
    layers: list[nn.Module] = []
    for i, conv in enumerate(convs):
        norm = nn.GroupNorm(2, conv.out_channels) if i % 2 else nn.BatchNorm2d(conv.out_channels)
        layers += [conv, norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, Pool(), nn.Linear(6, CLASSES))


def _signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 6, 9, stride=2, padding=4), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 6, 3), nn.ReLU(),
        Pool(), nn.Linear(6, CLASSES),
    )  # fmt: skip


def _volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(),
        nn.Conv3d(4, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU(),
        Pool(), nn.Linear(4, CLASSES),
    )  # fmt: skip


_IMAGE, _LARGER = (3, 32, 32), (3, 64, 64)

LIBRARIES: dict[str, Entry] = {
    "torchvision/resnet18": Entry(_torchvision("resnet18"), _IMAGE, 16),
    "torchvision/resnet50": Entry(_torchvision("resnet50"), _IMAGE, 16),
    "torchvision/vgg16": Entry(_vgg("vgg16"), _IMAGE, 12),
    "torchvision/vgg16_bn": Entry(_vgg("vgg16_bn"), _IMAGE, 12),
    "torchvision/mobilenet_v2": Entry(_torchvision("mobilenet_v2"), _LARGER, 17),
    "torchvision/mobilenet_v3_small": Entry(_torchvision("mobilenet_v3_small"), _LARGER, 11),
    "timm/fused": Entry(_timm_fused, (3, 12, 12), 2),
    "timm/resnet18": Entry(_timm("resnet18"), _IMAGE, 16),
    "timm/mobilenetv3_small_100": Entry(_timm("mobilenetv3_small_100"), _LARGER, 11),
    "transformers/resnet": Entry(_transformers_resnet, _IMAGE, 6),
}
OWN: dict[str, Entry] = {
    "functional": Entry(FunctionalResNet, (3, 16, 16), 6),
    "separate_lists": Entry(SeparateLists, (3, 12, 12), 3),
    "pre_activation": Entry(PreActivation, (3, 12, 12), 3),
    "shared": Entry(SharedConvolution, (3, 12, 12), 2),
    "plain": Entry(_plain, (3, 12, 12), 2),
    "depthwise": Entry(_depthwise, (3, 16, 16), 2),
    "odd": Entry(_odd, _IMAGE, 7),
    "signal": Entry(_signal, (2, 40), 2),
    "volume": Entry(_volume, (1, 8, 8, 8), 1),
}
ZOO = LIBRARIES | OWN
#: The largest, which go the same ways as their smaller kin: where they would take a suite's minutes they are `long`.
LARGE = ("torchvision/resnet50", "torchvision/vgg16", "torchvision/vgg16_bn")


def some_long(names: Iterable[str]) -> list[Any]:
    """The names as values of a parametrized test, in which the largest networks are `long`."""
    return [pytest.param(name, marks=pytest.mark.long) if name in LARGE else name for name in names]
