"""Code that channels are hard to follow through: written in place, counted, shared, put aside. Numbers stay those of the run
that computes everything."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tost_plugins
from tost_plugins import Mask, Session
from tost_plugins.masks import live
from tost_plugins.training.params import prunable


class Odd(nn.Module):
    """Two convolutions and a head, with `between` between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv1(x).relu()).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return self.conv2(x)


class WritesInParts(Odd):
    def between(self, x: Tensor) -> Tensor:
        out, y = x.new_zeros(len(x), 8, *x.shape[2:]), self.conv2(x)
        out[:, :4].copy_(y[:, 4:])
        out.narrow(1, 4, 4).add_(y[:, :4])
        return out


class WritesThroughViews(Odd):
    def between(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        flat = out.view(len(x), 8, -1)
        flat += self.conv2(x).flatten(2)
        return out


class Counts(Odd):
    def between(self, x: Tensor) -> Tensor:
        return self.conv2(x / x.shape[1] ** 0.5) * (8 / x.size(1))


class Shares(Odd):
    """Two layers with one weight: what the first does not use, the second does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3.weight = self.conv2.weight

    def between(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(x).relu())


class TakesAType(Odd):
    def between(self, x: Tensor) -> Tensor:
        return self.conv2(x + torch.arange(8).to(x).view(1, -1, 1, 1))


class OneRow(Odd):
    def between(self, x: Tensor) -> Tensor:
        return self.conv2(x) * self.fc(x.mean((0, 2, 3))).sum()


class PutsAside(Odd):
    def between(self, x: Tensor) -> Tensor:
        self.seen = self.conv2(x)
        return self.seen


class Functional(Odd):
    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv2.weight, self.conv2.bias, padding=1)


KINDS = [WritesInParts, WritesThroughViews, Counts, Shares, TakesAType, OneRow, PutsAside, Functional]


def found(kind: type[nn.Module]) -> tuple[nn.Module, Mask, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    net = kind().double()
    masks = {name: torch.rand(weight.shape) < 0.4 for name, weight in prunable(net).items()}
    masks["conv1.weight"][4:] = False
    masks["conv2.weight"][5:] = False
    masks["conv2.weight"][:, 2] = False
    return net, Mask(masks), [(torch.randn(4, 3, 6, 6).double(), torch.randint(4, (4,))) for _ in range(4)]


def trained(net: nn.Module, mask: Mask, loader: Any, compact: bool) -> dict[str, Tensor]:
    session = Session(
        net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": [], "compact": compact}, mask
    ).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    with session.drive(optimizer, loader, total_steps=len(loader)):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compact_run_is_the_whole_one(kind: type[nn.Module]) -> None:
    net, mask, loader = found(kind)
    whole = trained(copy.deepcopy(net), live(net, mask, loader[0]), loader, False)
    for name, value in trained(net, mask, loader, True).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_live_does_nothing(kind: type[nn.Module]) -> None:
    net, mask, loader = found(kind)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)  # what is constant is 0, except where a number is added
    used = live(net, mask, loader[0])
    mask.apply_(dict(net.named_parameters()))
    out = net(loader[0][0])
    if kind is not TakesAType:
        out.square().sum().backward()
        for name, weight in prunable(net).items():
            assert not weight.grad[mask[name] & ~used[name]].any(), name
        used.apply_(dict(net.named_parameters()))
        torch.testing.assert_close(net(loader[0][0]), out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_network_says_the_same(kind: type[nn.Module]) -> None:
    net, mask, loader = found(kind)
    net(loader[0][0])
    small = tost_plugins.compact(net, mask, loader[1][0])
    mask.apply_(dict(net.named_parameters()))
    torch.testing.assert_close(small(loader[0][0]), net.eval()(loader[0][0]))
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())


def test_code_that_counts_is_said() -> None:
    net, mask, loader = found(Counts)
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "compact": True}, mask).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), loader)
    assert session.left_out == [
        "compact (its outputs would be others: code counts channels, or draws numbers for each)"
    ]
    session.finish()


def test_looking_leaves_no_attributes() -> None:
    net, mask, loader = found(PutsAside)
    live(net, mask, loader[0])
    assert not hasattr(net, "seen")
    copy.deepcopy(net)


@pytest.mark.parametrize("budget", ["kept", "live"])
def test_a_forward_that_uses_another_batch_has_no_paths(budget: str) -> None:
    """Nothing of what it returns descends from what it was given: no mask of nothing, and no refusal of a good one."""
    net, _, loader = found(Odd)
    other = loader[1][0]
    given: Any = {"batches": loader, "forward": lambda model, batch: model(other), "budget": budget}
    if budget == "live":
        with pytest.raises(tost_plugins.TostError, match="expected outputs that descend from the inputs, got none"):
            tost_plugins.masks.find(net, "magnitude", 0.9, **given)
    else:
        assert tost_plugins.masks.find(net, "magnitude", 0.5, **given).kept > 0
