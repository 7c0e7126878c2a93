"""neuron_gradients: the factors by hand, whose gradients are multiplied, and that nothing else is."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError
from tost_plugins.errors import Inapplicable
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.neuron_gradients import NeuronGradients, factors

ON = {"kind": "neuron_gradients"}


def rows(*kept: list[int]) -> Tensor:
    return torch.tensor(kept, dtype=torch.bool)


def mask_of(net: nn.Module, seed: int = 0) -> Mask:
    """A random one, whose neurons keep between a tenth and nine tenths."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, param in prunable(net).items():
        share = torch.linspace(0.1, 0.9, param.shape[0]).view(-1, *[1] * (param.ndim - 1))
        kept[name] = torch.rand(param.shape, generator=generator) < share
    return Mask(kept)


class Noting(torch.optim.SGD):
    """Notes the gradients of its step, which is the network's last."""

    seen: list[list[Tensor | None]]

    def step(self, closure: Any = None) -> None:
        noted = [None if p.grad is None else p.grad.clone() for group in self.param_groups for p in group["params"]]
        self.seen = [*getattr(self, "seen", []), noted]
        super().step(closure)


def gradients(net: nn.Module, recipe: dict[str, Any], mask: Mask | None = None, steps: int = 1) -> list[dict[str, Any]]:
    """Name -> the gradient that the optimizer was given, in each step."""
    session, optimizer = Session(net, recipe, mask).attach(), Noting(net.parameters(), lr=0.05, momentum=0.9)
    names = [name for name, _ in net.named_parameters()]
    with session.drive(optimizer, digits(1), total_steps=steps):
        for x, y in digits(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return [dict(zip(names, noted, strict=True)) for noted in optimizer.seen]


# ---- the factors


def test_factors_by_hand() -> None:
    found = factors(rows([1, 0, 0, 0], [1, 1, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.25 / 0.625], [1 / 0.625]]).sqrt())
    assert [round(float(value), 3) for value in found.flatten()] == [0.632, 1.265]


def test_equal_sparsity_is_the_identity_bit_for_bit() -> None:
    for kept in (1, 3, 7):
        mask = torch.zeros(11, 7).index_fill(1, torch.arange(kept), 1.0)
        assert torch.equal(factors(mask), torch.ones(11, 1))


def test_a_neuron_that_keeps_nothing_has_one_and_counts_in_the_mean() -> None:
    found = factors(rows([0, 0], [1, 0], [1, 1]))  # kept shares 0, 1/2 and 1, whose mean is 1/2
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 1.0, 2.0**0.5]))
    assert torch.equal(factors(torch.zeros(3, 2)), torch.ones(3, 1))


def test_a_transposed_convolution_has_its_neurons_along_the_second_dimension() -> None:
    kept = torch.zeros(2, 2, 1, 2)  # two inputs, two outputs, a kernel of two
    kept[0, 0, 0, 0] = 1
    kept[:, 1] = 1
    found = factors(kept, groups=1)
    assert found.shape == (2, 2, 1, 1)
    for inputs in found[:, :, 0, 0]:
        torch.testing.assert_close(inputs, torch.tensor([0.25 / 0.625, 1 / 0.625]).sqrt())
    grouped = torch.ones(4, 1, 2)  # two groups of two inputs and one output each: the first output loses three of four
    grouped[0], grouped[1, 0, 0] = 0, 0
    first, second = ((share / 0.625) ** 0.5 for share in (0.25, 1.0))
    torch.testing.assert_close(factors(grouped, groups=2).flatten(), torch.tensor([first, first, second, second]))


# ---- what is multiplied


@pytest.mark.parametrize("norm", [True, False])
def test_the_optimizer_gets_the_masked_gradient_times_the_factor(norm: bool) -> None:
    plain, net = Digits(norm), Digits(norm)
    mask = mask_of(net)
    recipe = {"mask": {"kind": "random", "sparsity": 0.5}}
    (wanted,), (found,) = gradients(plain, recipe, mask), gradients(net, {**recipe, "tweaks": [ON]}, mask)
    for name, gradient in wanted.items():
        if name in mask:
            assert not torch.equal(found[name], gradient) and not found[name][~mask[name]].any()
            gradient = gradient * factors(mask[name])
        assert torch.equal(found[name], gradient), name


def test_layers_selects_by_globs() -> None:
    plain, net = Digits(), Digits()
    mask = mask_of(net)
    recipe = {"mask": {"kind": "random", "sparsity": 0.5}}
    (wanted,) = gradients(plain, recipe, mask)
    (found,) = gradients(net, {**recipe, "tweaks": [{**ON, "layers": ["body.0", "*.7"]}]}, mask)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == ["body.0.weight", "body.7.weight"]
    with pytest.raises(
        TostError, match=r"neuron_gradients.layers: expected globs .* got \['head'\]; there are body.0, "
    ):
        NeuronGradients(layers=("head",)).attach(net, 0)


def test_frozen_weights_and_those_without_a_gradient_pass() -> None:
    net = Digits()
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": [ON]}, mask_of(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with session.drive(optimizer, digits(1), total_steps=2):
        before = copy.deepcopy(net.body[0].weight.detach())
        net.body[0].weight.requires_grad_(False)
        for x, y in digits(2):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert net.body[0].weight.grad is None and torch.equal(net.body[0].weight, before)


class Tied(nn.Module):
    """A head that shares its weight with an embedding, and a layer that shares nothing."""

    def __init__(self, more: bool = True) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.middle = nn.Linear(4, 4) if more else nn.Identity()
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.words(x)))


def test_a_weight_that_an_embedding_uses_too_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for tweaks in ([], [ON]):
        torch.manual_seed(0)
        net = Tied()
        session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": tweaks}, mask_of(net))
        optimizer = Noting(net.parameters(), lr=0.1)
        with caplog.at_level("INFO"), session.drive(optimizer, total_steps=1):
            F.cross_entropy(net(torch.arange(10)), torch.arange(10)).backward()
            optimizer.step()
        found.append(dict(zip((name for name, _ in net.named_parameters()), optimizer.seen[0], strict=True)))
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == ["middle.weight"]
    assert "neuron_gradients: left alone are head (other kinds of modules use the weight too)" in caplog.text
    with pytest.raises(
        Inapplicable, match=r"neuron_gradients: expected a layer whose weight is its own, got only head"
    ):
        NeuronGradients().attach(Tied(more=False), 0)
    session = Session(Tied(more=False), {"mask": MOVING["set"], "tweaks": [{**ON, "optional": True}]}).attach()
    assert session.left_out == ["neuron_gradients (expected a layer whose weight is its own, got only head, whose weights "
                                "other kinds of modules use too)"]  # fmt: skip


class Odd(nn.Module):
    """Transposed convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.ConvTranspose2d(1, 4, 3)
        self.wide = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.up(x)).mean((2, 3)))


def test_transposed_convolutions_in_a_run() -> None:
    plain, net = Odd(), Odd()
    mask = mask_of(net)
    recipe = {"mask": {"kind": "random", "sparsity": 0.5}}
    (wanted,), (found,) = gradients(plain, recipe, mask), gradients(net, {**recipe, "tweaks": [ON]}, mask)
    for name, groups in (("up.weight", 1), ("wide.weight", 2), ("head.weight", 0)):
        assert torch.equal(found[name], wanted[name] * factors(mask[name], groups)), name
    kept = mask["wide.weight"].view(2, 2, 3, -1).float().mean((1, 3)).flatten()  # of each of the six outputs
    outputs = (kept / kept.mean()).sqrt()
    torch.testing.assert_close(factors(mask["wide.weight"], 2)[0, :, 0, 0], outputs[:3])
    torch.testing.assert_close(factors(mask["wide.weight"], 2)[2, :, 0, 0], outputs[3:])


def test_the_hubs_conv1d_has_its_inputs_first() -> None:
    hub = pytest.importorskip("transformers.pytorch_utils")
    found = []
    for tweaks in ([], [ON]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), hub.Conv1D(10, 64))
        mask = Mask({"1.weight": mask_of(nn.Linear(64, 10))["weight"].t().contiguous()})
        found += gradients(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": tweaks}, mask)
    assert torch.equal(found[1]["1.weight"], found[0]["1.weight"] * factors(mask["1.weight"].t()).t())


# ---- masks that move


def test_a_mask_that_moves_has_the_factors_of_each_moment() -> None:
    net = Digits()
    session = Session(net, {"mask": MOVING["set"], "tweaks": [ON]})
    optimizer = Noting(net.parameters(), lr=0.05)
    seen = []
    with session.drive(optimizer, digits(1), total_steps=10):
        for step, (x, y) in enumerate(digits(10)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            name, before = "body.3.weight", session.mask
            plain = net.body[3].weight.grad.clone()
            taken = len(getattr(optimizer, "seen", []))
            optimizer.step()
            if len(optimizer.seen) > taken:
                grads = dict(zip((n for n, _ in net.named_parameters()), optimizer.seen[-1], strict=True))
                assert torch.equal(grads[name], plain * factors(before[name])), step
                seen.append(before)
            metrics = session.metrics()
            assert 0 < metrics["tost/neuron_gradients/least"] < 1 < metrics["tost/neuron_gradients/most"]
    assert any(one != two for one, two in itertools.pairwise(seen)) and len(seen) >= 7
    assert "tost/neuron_gradients/least" not in session.metrics()


def test_rigl_compares_gradients_that_nobody_has_multiplied() -> None:
    """With a learning rate of 0 nothing moves but the mask, and it goes where it goes without the tweak."""
    moved = []
    for tweaks in ([], [ON]):
        net = Digits(norm=False)
        session = Session(net, {"mask": {**MOVING["rigl"], "every": "1ba"}, "tweaks": tweaks}).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with session.drive(optimizer, digits(1), total_steps=10):
            moved.append([session.mask])
            for x, y in digits(3):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                moved[-1].append(session.mask)
    assert moved[0] == moved[1] and moved[0][0] != moved[0][-1]


def test_under_dnw_hidden_weights_are_multiplied_with_their_neuron() -> None:
    plain, net = Digits(), Digits()
    recipe = {"mask": MOVING["dnw"]}
    wanted, found = gradients(plain, recipe, steps=1), gradients(net, {**recipe, "tweaks": [ON]}, steps=1)
    name = "body.3.weight"
    start = Session(Digits(), recipe)
    start.begin(torch.optim.SGD(start.model.parameters(), lr=0.05), digits(1), total_steps=1)
    kept = start.mask[name]
    assert wanted[0][name][~kept].any()  # dense
    assert torch.equal(found[0][name], wanted[0][name] * factors(kept))
