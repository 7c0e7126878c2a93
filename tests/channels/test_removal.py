"""A compact network is an ordinary one that computes what the masked network does."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import zoo
from command import refused
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError, compact, masks
from tost_plugins.lab import models
from tost_plugins.training.task import Task

CIFAR = ("resnet20", "resnet32", "resnet18", "vgg16", "mobilenet_v2")
NETS = [*zoo.ZOO, *(f"cifar/{name}" for name in CIFAR)]


def network(name: str) -> tuple[nn.Module, Tensor]:
    if not name.startswith("cifar/"):
        return zoo.build(name), zoo.inputs(name)
    torch.manual_seed(0)
    net = models.build(name, 10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return net, torch.randn(2, 3, 32, 32)


def masked(net: nn.Module, mask: Mask) -> nn.Module:
    """A copy in eval mode whose removed weights are 0."""
    plain = copy.deepcopy(net).eval()
    mask.apply_(Task.of(plain).params)
    return plain


def small_of(net: nn.Module, images: Tensor, kind: str, **options: object) -> tuple[nn.Module, Mask]:
    """The compact network of the sparsest mask that connects."""
    for sparsity in (0.98, 0.9, 0.8, 0.6):
        try:
            mask = masks.find(net, kind, sparsity, on_collapse="keep_one", **options)
            return compact(net, mask, images), mask
        except TostError as error:
            assert "expected a path of kept weights" in str(error)
    raise AssertionError("no mask connects")


def parameters(net: nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())


def same(small: nn.Module, plain: nn.Module, images: Tensor) -> bool:
    """Whether two networks say the same to other images than those they were compared on."""
    fresh = torch.randn(3, *images.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (zoo.logits(copy.deepcopy(net).double(), fresh) for net in (small, plain))
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-10 * float(theirs.abs().max())


@pytest.mark.parametrize("name", zoo.some_long(NETS))
def test_a_compact_network_computes_the_same_with_fewer_parameters(name: str) -> None:
    net, images = network(name)
    net = net.double()  # float32 rounds what goes into a bias
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    small, mask = small_of(net, images.double(), "synflow", rounds=5, input_shape=tuple(images.shape[1:]))
    assert same(small, masked(net, mask), images)
    assert parameters(small) < 0.8 * parameters(net)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert [(path, type(module)) for path, module in small.named_modules()] == [
        (path, type(module)) for path, module in net.named_modules()
    ]


def channels_at_random(net: nn.Module, seed: int) -> Mask:
    """A mask that removes filters, inputs and some weights besides; of the last layer no filter."""
    generator, params, found = torch.Generator().manual_seed(seed), Task.of(net).params, {}
    share = (0.9, 0.7, 0.5)[seed % 3]
    for name, param in params.items():
        filters, inputs = (torch.rand(size, generator=generator) < share for size in param.shape[:2])
        if name == list(params)[-1]:
            filters[:] = True
        kept = torch.rand(param.shape, generator=generator) < 0.8 if param.shape[1] > 1 else torch.ones(param.shape) > 0
        inputs = inputs if param.shape[1] > 1 else inputs | True
        found[name] = kept & filters.view(-1, *[1] * (param.ndim - 1)) & inputs.view(1, -1, *[1] * (param.ndim - 2))
    return Mask(found)


@pytest.mark.parametrize("name", [*zoo.OWN, "timm/fused", "transformers/resnet"])
def test_whatever_goes_with_constants_behind_it(name: str) -> None:
    net, images = network(name)
    net, smaller = net.double(), 0
    for seed in range(6):
        mask = channels_at_random(net, seed)
        try:
            small = compact(net, mask, images.double())
        except TostError as error:
            assert "expected a path of kept weights" in str(error)
            continue
        assert same(small, masked(net, mask), images)
        smaller += parameters(small) < parameters(net)
    assert smaller


def test_it_is_an_ordinary_network() -> None:
    net, images = network("cifar/resnet20")
    small, _ = small_of(net, images, "synflow", rounds=5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in net.parameters()}
    assert all(param.requires_grad and param.dtype == torch.float32 for param in small.parameters())
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twin = copy.deepcopy(small)
    twin.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(twin(images), small(images)) and torch.equal(loaded(images), small(images))
    optimizer, first = torch.optim.SGD(twin.parameters(), lr=0.1), None
    twin.train()
    for _ in range(5):
        loss = F.cross_entropy(twin(images), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.detach() if first is None else first
    assert loss < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_network_keeps_its_type(dtype: torch.dtype) -> None:
    net, images = network("functional")
    net, images = net.to(dtype), images.to(dtype)
    small, mask = small_of(net, images, "synflow", rounds=5, input_shape=(3, 16, 16))
    assert all(tensor.dtype == dtype for tensor in small.state_dict().values() if tensor.is_floating_point())
    assert parameters(small) < 0.5 * parameters(net)
    ours, theirs = small(images), masked(net, mask)(images)
    assert float((ours - theirs).abs().max()) < 0.1 * float(theirs.abs().max())


def of_layers(*layers: nn.Module) -> nn.Module:
    """Layers, then the mean over all places, with numbers that are far from 0."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers, zoo.Pool(), nn.Linear(layers[-1].out_channels, 2)).double()
    for param in net.parameters():
        nn.init.uniform_(param, 0.5, 1.5)
    return net


def keeping(net: nn.Module, **rows: list[int]) -> Mask:
    """A mask without these filters of the layers `l0`, `l3`, ..."""
    kept = {name: torch.ones(param.shape, dtype=torch.bool) for name, param in Task.of(net).params.items()}
    for layer, gone in rows.items():
        kept[f"{layer[1:]}.weight"][gone] = False
    return Mask(kept)


@pytest.mark.parametrize(
    ("second", "channels"),
    [
        (nn.Conv2d(4, 3, 1, bias=False), 2),
        (nn.Conv2d(4, 3, 3), 2),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), 2),
        (nn.Conv2d(4, 3, 3, padding="valid"), 2),
        (nn.Conv2d(4, 3, 3, padding=1), 4),
        (nn.Conv2d(4, 3, 3, padding="same"), 4),
    ],
)
def test_a_constant_that_is_read_goes_into_the_next_bias_unless_zeros_are_padded(
    second: nn.Module, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tost_plugins")
    net = of_layers(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), copy.deepcopy(second))
    small = compact(net, keeping(net, l0=[1, 2]), images := torch.randn(2, 2, 5, 5, dtype=torch.float64))
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == channels
    assert ("2 channels without a path stay for 3, which pads zeros" in caplog.text) == (channels == 4)
    assert same(small, masked(net, keeping(net, l0=[1, 2])), images)


def test_constants_go_through_a_flatten() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    nn.init.ones_(net[0].bias)
    mask, images = keeping(net, l0=[1]), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    small = compact(net, mask, images)
    assert (small[0].out_channels, small[3].in_features) == (2, 32)
    assert same(small, masked(net, mask), images)


class Counting(nn.Module):
    """Its second block counts the channels that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(i, 6, 1, bias=False) for i in (3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.third(x * len(x[0])).mean((2, 3))


def test_what_counts_channels_stays_whole_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tost_plugins")
    net = Counting()
    mask = Mask({f"{name}.weight": torch.ones(6, i, 1, 1) for name, i in (("first", 3), ("second", 6), ("third", 6))})
    mask = Mask({name: keep & (torch.arange(6).view(-1, 1, 1, 1) > 2) for name, keep in mask.items()})
    small = compact(net, mask, torch.randn(2, 3, 4, 4))
    assert (small.first.out_channels, small.second.in_channels, small.second.out_channels) == (3, 3, 6)
    assert same(small.float(), masked(net, mask), torch.randn(2, 3, 4, 4))
    (line,) = caplog.messages
    assert "whole, since it would change outputs: third" in line and "largest difference" in line


def test_no_path_and_no_plain_network_are_refused() -> None:
    net, images = network("plain")
    empty = Mask({name: torch.zeros(param.shape) for name, param in Task.of(net).params.items()})
    refused(lambda: compact(net, empty, images), "compact: expected a path of kept weights")
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": ["soft_activation"]}).attach()
    refused(lambda: compact(net, Mask.dense(Task.of(net).params), images), "a session at work", "session.finish()")
    del session
