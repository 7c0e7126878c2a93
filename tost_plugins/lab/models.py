"""Networks that a recipe can name: `cifar/...` written here, `torchvision/...` and `timm/...` from elsewhere.

A name is looked up in a known source and never runs a user's code. The packages are imported only when named.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from tost_plugins.errors import TostError, unknown
from tost_plugins.training.optional import package

# Two networks of torchvision return a tuple while training unless told not to; training expects logits.
_AUX_LOGITS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a pooling after each

# MobileNetV2: expansion, output channels, number of blocks, stride of the first. Two strides of the ImageNet
# network are 1 here, since a CIFAR image starts at 32 x 32.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def names() -> list[str]:
    """Names that `build` knows without any further package, such as `cifar/resnet20`."""
    return [f"cifar/{name}" for name in _CIFAR]


def build(name: str, classes: int, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network by its name.

    `name` is one of `names()`, or `torchvision/NAME`, or `timm/NAME` (without pretrained weights). The
    network maps images `(N, in_channels, H, W)` to logits `(N, classes)`; the `cifar/` ones take any H, W
    from 8 up. Initial values come from the global random state: call `torch.manual_seed` first.

    Raises TostError for a name that no source knows, a package that is not installed, fewer than 2 classes,
    fewer than 1 channel, and for torchvision with any other number of channels than 3.

    >>> import torch
    >>> build("cifar/resnet20", classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    if classes < 2:
        raise TostError(f"model: expected at least 2 classes, got {classes!r}; check the data's labels")
    if in_channels < 1:
        remedy = "grey images have 1, colour images 3"
        raise TostError(f"model: expected at least 1 input channel, got {in_channels!r}; {remedy}")
    source, _, rest = name.partition("/")
    if source not in _SOURCES or not rest:
        raise unknown("model", "model", name, [*names(), "torchvision/NAME", "timm/NAME"])
    return _SOURCES[source](rest, classes, in_channels)


def _cifar(name: str, classes: int, in_channels: int) -> nn.Module:
    if name not in _CIFAR:
        raise unknown("model", "model", f"cifar/{name}", names())
    model = _CIFAR[name](classes, in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def _torchvision(name: str, classes: int, in_channels: int) -> nn.Module:
    models = package("torchvision.models", "model", "tost_plugins[vision]")
    known = models.list_models(module=models)  # classification only: detectors return losses, not logits
    if name not in known:
        raise _unlisted("torchvision", name, known)
    if in_channels != 3:
        expected = f"3 input channels for 'torchvision/{name}'"
        remedy = "use cifar/... or timm/..., which take any number"
        raise TostError(f"model: expected {expected}, got {in_channels!r}; {remedy}")
    return models.get_model(name, weights=None, num_classes=classes, **_AUX_LOGITS.get(name, {}))


def _timm(name: str, classes: int, in_channels: int) -> nn.Module:
    timm = package("timm", "model", "timm")
    if ":" in name or not timm.is_model(name):  # "hf-hub:..." would fetch a configuration from elsewhere
        raise _unlisted("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=in_channels)


def _unlisted(source: str, name: str, known: list[str]) -> TostError:
    """Like `unknown`, but with the nearest names only: timm alone has more than a thousand."""
    near = ", ".join(f"{source}/{found}" for found in difflib.get_close_matches(name, known, n=5, cutoff=0))
    return TostError(f"model: expected a known {source} model, got {name!r}; nearest of {len(known)}: {near}")


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1; no bias, which the norm after it would cancel."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


_Act = type[nn.Module] | None


def _conv_norm(inputs: int, outputs: int, act: _Act = nn.ReLU, **conv: int) -> nn.Sequential:
    parts: dict[str, nn.Module] = {"conv": _conv(inputs, outputs, **conv), "norm": nn.BatchNorm2d(outputs)}
    if act is not None:
        parts["act"] = act()
    return nn.Sequential(OrderedDict(parts))


def _with_head(parts: dict[str, nn.Module], features: int, classes: int) -> nn.Sequential:
    """`parts` in order, then the mean over the image and one linear classifier."""
    tail = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(features, classes)}
    return nn.Sequential(OrderedDict({**parts, **tail}))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution and a norm where the shape changes.

    Paper: He et al., "Deep Residual Learning for Image Recognition", 2016, option B.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, None, kernel=1, stride=stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions, and the shortcut around them."""
        out = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(out)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen by 1x1, depthwise 3x3, narrow by 1x1; a shortcut where the stride is 1.

    Paper: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
    Differs from the paper: where the channels change at stride 1 the shortcut is a 1x1 convolution and a
    norm, as in the usual CIFAR variant; the paper has no shortcut there.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _conv_norm(inputs, wide, nn.ReLU6, kernel=1)
        self.depthwise = _conv_norm(wide, wide, nn.ReLU6, stride=stride, groups=wide)
        self.project = _conv_norm(wide, outputs, None, kernel=1)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = inputs == outputs
            self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, None, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Wider, depthwise, narrow again; with the shortcut where sizes agree."""
        out = self.project(self.depthwise(self.expand(x)))
        return out if self.shortcut is None else out + self.shortcut(x)


def _resnet(blocks: int, widths: tuple[int, ...]) -> Callable[[int, int], nn.Module]:
    """A ResNet with a 3x3 stem and `blocks` basic blocks a stage; each but the first halves the image."""

    def make(classes: int, in_channels: int) -> nn.Module:
        parts: dict[str, nn.Module] = {"stem": _conv_norm(in_channels, widths[0])}
        inputs = widths[0]
        for number, width in enumerate(widths, start=1):
            first = BasicBlock(inputs, width, stride=1 if number == 1 else 2)
            others = [BasicBlock(width, width, stride=1) for _ in range(blocks - 1)]
            parts[f"stage{number}"] = nn.Sequential(first, *others)
            inputs = width
        return _with_head(parts, inputs, classes)

    return make


def _vgg16(share: int = 1) -> Callable[[int, int], nn.Module]:
    """VGG-16 without its two hidden linear layers; each width divided by `share`."""

    def make(classes: int, in_channels: int) -> nn.Module:
        layers: list[nn.Module] = []
        for widths in _VGG16:
            for width in widths:
                layers.append(_conv_norm(in_channels, width // share))
                in_channels = width // share
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil: an image already down to 1 x 1 stays so
        return _with_head({"features": nn.Sequential(*layers)}, in_channels, classes)

    return make


def _mobilenet_v2(classes: int, in_channels: int) -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = 32
    for expansion, outputs, count, stride in _MOBILENET_V2:
        for number in range(count):
            blocks.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion))
            inputs = outputs
    parts = {"stem": _conv_norm(in_channels, 32, nn.ReLU6), "blocks": nn.Sequential(*blocks)}
    return _with_head({**parts, "last": _conv_norm(inputs, 1280, nn.ReLU6, kernel=1)}, 1280, classes)


# Three stages of n blocks: depth 6n + 2. ResNet-32 is the widened one of the GraSP line of papers (1.9 M
# parameters). The slim VGG-16 has a quarter of the widths (0.9 M).
_CIFAR: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": _resnet(1, (16, 32, 64)),
    "resnet14": _resnet(2, (16, 32, 64)),
    "resnet18": _resnet(2, (64, 128, 256, 512)),
    "resnet20": _resnet(3, (16, 32, 64)),
    "resnet32": _resnet(5, (32, 64, 128)),
    "resnet44": _resnet(7, (16, 32, 64)),
    "resnet56": _resnet(9, (16, 32, 64)),
    "resnet110": _resnet(18, (16, 32, 64)),
    "vgg16": _vgg16(),
    "vgg16_slim": _vgg16(4),
    "mobilenet_v2": _mobilenet_v2,
}

_SOURCES = {"cifar": _cifar, "torchvision": _torchvision, "timm": _timm}
