"""Networks and numbers at the edge, as a user meets them: what works stays exact, what cannot work is named."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Session, TostError, masks
from tost_plugins.training.params import prunable

# What each method is tried with; "dnw" and "top_kast" hide, the others from "gradual" on move.
KINDS: dict[str, dict[str, Any]] = {
    "random": {}, "magnitude": {}, "snip": {}, "grasp": {"per_class": 2}, "synflow": {"rounds": 3}, "gradual": {"initial": 0.3},
    "set": {"every": "1ba"}, "rigl": {"every": "1ba"}, "snfs": {"every": "1ba"}, "dnw": {}, "top_kast": {"every": "1ba"},
    "ac_dc": {"begin": "1ba", "until": "1ba"}, "edge_popup": {},
}  # fmt: skip
TWEAKS = ["ghost_skip", "soft_activation", {"kind": "rescaled_init", "iterations": 2}, "label_smoothing"]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Stem, two 3x3 convolutions and a classifier; the second convolution can be the first again, or have its weight."""

    def __init__(self, second: str = "own") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = self.conv1 if second == "same" else nn.Conv2d(8, 8, 3, padding=1, bias=False)
        if second == "tied":
            self.conv2.weight = self.conv1.weight
        self.norm2, self.act, self.fc = nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(self.act(self.stem(x)))))
        return self.fc(self.act(self.norm2(self.conv2(x))).mean((2, 3)))


def few(size: int = 8, side: int = 6, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, side, side, dtype=dtype), torch.arange(size) % 4) for _ in range(2)]


def mask_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "sparsity": 0.5, "on_collapse": "keep_one", **KINDS[kind], **more}


def trained(
    net: nn.Module, mask: dict[str, Any], tweaks: Any = TWEAKS, batches: Any = None, steps: int = 3, lr: float = 0.05
) -> Session:
    """The finished session of a short run with the parameters that are not frozen; the network keeps its zeros."""
    batches, session = batches or few(), Session(net, {"mask": mask, "tweaks": tweaks}).attach()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    with session.drive(optimizer, batches, F.cross_entropy, total_steps=steps, steps_per_epoch=2):
        criterion = session.criterion(F.cross_entropy)
        for number in range(steps):
            images, labels = batches[number % 2]
            optimizer.zero_grad()
            criterion(net(images), labels).backward()
            optimizer.step()
    for name, weight in prunable(net, mask.get("ignore", ())).items():
        assert not weight.detach()[~session.mask[name]].any(), name
    return session


# NaN and infinity


def test_weights_that_the_last_step_blows_up_are_told_and_stay_zero_outside_the_mask(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net()
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        session = trained(net, mask_of("random"), [], steps=1, lr=float("inf"))
    assert session.state == "finished"
    assert not torch.isfinite(net.conv1.weight).all() and not net.conv1.weight[~session.mask["conv1.weight"]].any()
    assert "finish: expected finite weights, got NaN or Inf in" in caplog.text and "conv1.weight" in caplog.text
    caplog.clear()
    trained(Net(), mask_of("random"), [], steps=1)
    assert "finite" not in caplog.text


@pytest.mark.parametrize("kind", ["random", "set", "rigl", "snfs", "gradual", "dnw", "top_kast", "ac_dc", "edge_popup"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_changed(kind: str, bad: float) -> None:
    net, batches = Net(), few()
    session = Session(net, {"mask": mask_of(kind)}).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session.start(optimizer, batches, total_steps=4, steps_per_epoch=2)
    for number in range(2):
        F.cross_entropy(net(batches[0][0]), batches[0][1]).mul(bad if number else 1).backward()
        before, mask = {name: value.clone() for name, value in net.state_dict().items()}, session.mask
        if not number:
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
            continue
        with pytest.raises(TostError, match="step 1: expected finite gradients, got NaN or Inf in"):
            session.before_step()
        assert session.mask == mask
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# Layers that are all zero


@every_kind
def test_a_layer_that_is_all_zero_trains_or_is_told(kind: str) -> None:
    net = Net()
    nn.init.zeros_(net.conv1.weight)
    if kind == "synflow":  # nothing flows through such a layer
        with pytest.raises(TostError, match=r"got scores of 0 everywhere; check for .* layers that are all 0"):
            trained(net, mask_of(kind))
    else:
        assert trained(net, mask_of(kind)).mask["conv1.weight"].any()


def test_from_zeros_and_auto_name_a_layer_that_is_all_zero() -> None:
    net = Net()
    nn.init.zeros_(net.conv1.weight)
    with pytest.raises(
        TostError, match=r"from_zeros: expected a path .* the last one ends at conv1\.weight \(layers without"
    ):
        trained(net, {"kind": "from_zeros"}, [])
    for kind in ("from_zeros", "auto"):
        net = Net()
        for layer in (net.conv1, net.conv2):
            nn.init.zeros_(layer.weight)
        session = trained(net, {"kind": kind, "on_collapse": "keep_one"}, [])
        assert [int(session.mask[name].sum()) for name in ("conv1.weight", "conv2.weight")] == [1, 1]


# Batch norm


@pytest.mark.parametrize("kind", ["snip", "grasp", "rescaled_init"])
def test_batch_norm_with_one_value_per_channel_is_named(kind: str) -> None:
    tweaks = [{"kind": "rescaled_init", "iterations": 1}] if kind == "rescaled_init" else []
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        TostError, match=r"expected more than 1 value per channel for batch norm in training mode, got .*drop_last"
    ):
        trained(net, mask_of("random" if tweaks else kind), tweaks, few(size=1, side=1))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


@every_kind
def test_batches_of_one_sample_do_where_batch_norm_has_a_map(kind: str) -> None:
    assert trained(Net(), mask_of(kind), batches=few(size=1)).mask.sparsity == pytest.approx(0.5, abs=0.01)


# Frozen, tied and shared


@every_kind
def test_frozen_layers_are_left_alone_and_named(kind: str) -> None:
    net = Net()
    for module in (net.stem, net.conv1, net.norm1):
        module.requires_grad_(False)
    before = net.conv1.weight.clone()
    session = trained(net, mask_of(kind))
    assert torch.equal(net.conv1.weight, before)
    assert not {"stem.weight", "conv1.weight"} & set(session.mask)
    assert session.mask.sparsity == pytest.approx(0.5, abs=0.01)
    assert "masks of frozen layers (stem, conv1)" in session.report().left_out


@every_kind
@pytest.mark.parametrize("second", ["tied", "same"])
def test_tied_weights_and_modules_used_twice(kind: str, second: str) -> None:
    net = Net(second)
    session = trained(net, mask_of(kind))
    assert isinstance(net.conv1.weight, nn.Parameter) and session.mask.kept == 412
    assert list(session.mask) == ["stem.weight", "conv1.weight", "fc.weight"]
    assert net.conv2.weight is net.conv1.weight and session.mask.sparsity == pytest.approx(0.5, abs=0.01)
    assert type(net.conv1) is nn.Conv2d and type(net.act) is nn.ReLU


# Tensors without values, and of few bits


def _attach(net: nn.Module) -> object:
    return Session(net, {"mask": mask_of("random"), "tweaks": TWEAKS}).attach()


WAYS: list[Callable[[nn.Module], object]] = [_attach, lambda net: masks.find(net, "random", 0.5)]


@pytest.mark.parametrize("way", WAYS, ids=["attach", "find"])
def test_lazy_and_meta_tensors_are_named_before_anything_changes(way: Callable[[nn.Module], object]) -> None:
    lazy, part = Net(), Net()
    lazy.norm2 = nn.LazyBatchNorm2d()  # type: ignore[assignment]
    part.conv2.to("meta")
    with torch.device("meta"):
        meta = Net()
    cases = [
        (lazy, r"norm2\.weight: expected a tensor with a shape, got a lazy one; run one batch through the model first"),
        (meta, r"stem\.weight: expected a tensor with values, got one on the meta device; materialise the model first"),
        (part, r"conv2\.weight: expected a tensor with values, got one on the meta device"),
    ]
    for net, message in cases:
        keys = list(net.state_dict())
        with pytest.raises(TostError, match=message):
            way(net)
        assert list(net.state_dict()) == keys
    lazy(few()[0][0])
    assert way(lazy)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_weights_of_other_precision_keep_it(kind: str, dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    session = trained(net, mask_of(kind), batches=few(dtype=dtype))
    assert {param.dtype for param in net.parameters()} == {dtype}
    assert session.mask.kept == round(0.5 * session.mask.size)


def test_quantized_weights_are_named_and_can_be_ignored() -> None:
    net = Net()
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        net.conv1.weight = nn.Parameter(torch.ones(8, 8, 3, 3).to(dtype), requires_grad=False)
        with pytest.raises(
            TostError, match=r"conv1\.weight: expected a floating-point weight of 16 bits or more, got torch\."
        ):
            masks.find(net, "random", 0.5)
        assert "conv1.weight" not in masks.find(net, "random", 0.5, ignore=["conv1"])


def test_layers_without_weights_and_with_complex_ones() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="zero-element"):
        net.add_module("none", nn.Linear(2, 0))
    mask = masks.find(net, "random", 0.5)
    assert "none.weight" not in mask and mask.sparsity == 0.5

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x.to(torch.complex64)).abs())

    batches = [(torch.randn(8, 4), torch.arange(8) % 2)] * 2
    assert trained(Complex(), mask_of("snip"), [], batches).mask.kept == 12


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def usual_dtype(request: Any) -> Any:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_another_usual_kind(kind: str, usual_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    tweaks = [tweak for tweak in TWEAKS if tweak != "label_smoothing"]
    session = Session(net, {"mask": {"kind": kind, "sparsity": 0.5, **KINDS[kind]}, "tweaks": tweaks, "compact": True})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with session.drive(optimizer, [(x, y)], F.cross_entropy, total_steps=3):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert all(param.dtype == usual_dtype for param in net.parameters())
    assert (
        not any(bool(net.get_parameter(name)[~kept].any()) for name, kept in session.mask.items())
        or kind == "edge_popup"
    )


def test_a_layer_that_transforms_its_weight_is_known_in_any_usual_kind(usual_dtype: torch.dtype) -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    assert list(prunable(nn.Sequential(nn.Linear(2, 2), Centred(2, 2)))) == ["0.weight"]
