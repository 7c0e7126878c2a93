"""What a mask connects, against a graph of single numbers that is walked by hand, and by its meaning on every network of the
zoo: what is not live has no gradient, and no output misses it."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import LIBRARIES, ZOO, build, inputs, logits

from tost_plugins import masks
from tost_plugins.errors import TostError
from tost_plugins.masks import Mask
from tost_plugins.masks.paths.connectivity import Paths
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

LENGTH = 4  # of the signals of the small networks

# ---- against brute force


class Small(nn.Module):
    """A network of conv1d blocks, from a list of their kinds, on signals with two channels."""

    def __init__(self, blocks: list[tuple[Any, ...]], end: str) -> None:
        super().__init__()
        self.blocks, self.end, channels, length = blocks, end, 2, LENGTH
        self.layers = nn.ModuleList()
        for kind, *how in blocks:
            if kind == "conv":
                width, kernel, padding = how
                self.layers.append(nn.Conv1d(channels, width, kernel, padding=padding, bias=False))
                channels, length = width, length + 2 * padding - kernel + 1
            elif kind == "grouped":
                self.layers.append(
                    nn.Conv1d(channels, 2 * channels, 1, groups=how[0] if channels % how[0] == 0 else channels)
                )
                channels *= 2
            elif kind == "sum":
                self.layers.append(nn.Conv1d(channels, channels, 3, padding=1))
            elif kind == "cat":
                self.layers.append(nn.Conv1d(channels, how[0], 1))
                channels += how[0]
            else:
                self.layers.append(nn.BatchNorm1d(channels))
        self.head = nn.Linear(channels * (length if end == "flatten" else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        for (kind, *_), layer in zip(self.blocks, self.layers, strict=True):
            out = layer(x)
            if kind == "sum":
                x = F.relu(x + out)
            elif kind == "cat":
                x = torch.cat([x, out.tanh()], 1)
            else:
                x = out.relu()
        return self.head(x.flatten(1) if self.end == "flatten" else x.mean(-1))


Edge = tuple[int, int, tuple[str, int] | None]  # from, to, through which weight


def graph(net: Small) -> tuple[list[Edge], list[int], list[int]]:
    """Every single number of a forward pass and what it is made of; the inputs' numbers and the outputs'."""
    edges: list[Edge] = []
    fresh = iter(range(10**6))

    def conv(x: list[list[int]], name: str, layer: nn.Conv1d) -> list[list[int]]:
        weight, pad, kernel = layer.weight, int(layer.padding[0]), layer.kernel_size[0]
        length = len(x[0]) + 2 * pad - kernel + 1
        out = [[next(fresh) for _ in range(length)] for _ in range(layer.out_channels)]
        per = layer.out_channels // layer.groups
        for o, i, k in torch.ones_like(weight).nonzero().tolist():
            source = x[o // per * weight.shape[1] + i]
            place = (o * weight.shape[1] + i) * kernel + k
            for t in range(length):
                if 0 <= t + k - pad < len(source):
                    edges.append((source[t + k - pad], out[o][t], (name, place)))
        return out

    x = [[next(fresh) for _ in range(LENGTH)] for _ in range(2)]
    start = [number for row in x for number in row]
    for index, ((kind, *_), layer) in enumerate(zip(net.blocks, net.layers, strict=True)):
        if kind == "norm":
            continue
        out = conv(x, f"layers.{index}.weight", layer)  # type: ignore[arg-type]
        if kind == "sum":
            edges += [(a, b, None) for old, new in zip(x, out, strict=True) for a, b in zip(old, new, strict=True)]
        x = [*x, *out] if kind == "cat" else out
    rows = [[number] for row in x for number in row] if net.end == "flatten" else x
    end, width = [next(fresh) for _ in range(2)], len(rows)
    edges += [(n, end[o], ("head.weight", o * width + i)) for o in range(2) for i, row in enumerate(rows) for n in row]
    return edges, start, end


def closure(edges: list[tuple[int, int]], start: list[int]) -> set[int]:
    """All that is reached from the start along edges."""
    after: dict[int, list[int]] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
    found, todo = set(start), list(start)
    while todo:
        new = [b for b in after.get(todo.pop(), []) if b not in found]
        found.update(new)
        todo += new
    return found


def by_hand(net: Small, mask: Mask) -> tuple[Mask, Mask, bool]:
    """The live weights, those that would be live if they were kept, and whether any path is whole."""
    edges, start, end = graph(net)
    kept = [(a, b) for a, b, key in edges if key is None or bool(mask[key[0]].flatten()[key[1]])]
    reached, leading = closure(kept, start), closure([(b, a) for a, b in kept], end)
    joins = {name: torch.zeros(part.numel(), dtype=torch.bool) for name, part in mask.items()}
    for a, b, key in edges:
        if key is not None and a in reached and b in leading:
            joins[key[0]][key[1]] = True
    shaped = Mask({name: part.view(mask[name].shape) for name, part in joins.items()})
    return Mask({name: shaped[name] & mask[name] for name in mask}), shaped, bool(reached & set(end))


def block() -> st.SearchStrategy[tuple[Any, ...]]:
    return st.one_of(
        st.tuples(st.just("conv"), st.integers(1, 4), st.just(3), st.integers(1, 2)),
        st.tuples(st.just("conv"), st.integers(1, 4), st.just(1), st.just(0)),
        st.tuples(st.just("grouped"), st.sampled_from([1, 2])),
        st.tuples(st.just("sum")),
        st.tuples(st.just("cat"), st.integers(1, 2)),
        st.tuples(st.just("norm")),
    )


@settings(max_examples=100)
@given(
    blocks=st.lists(block(), min_size=1, max_size=4),
    end=st.sampled_from(["flatten", "mean"]),
    share=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_small_networks_against_brute_force(blocks: list[Any], end: str, share: float, seed: int) -> None:
    net = Small(blocks, end)
    generator = torch.Generator().manual_seed(seed)
    mask = Mask({n: torch.rand(p.shape, generator=generator) < share for n, p in prunable(net).items()})
    live, joins, whole = by_hand(net, mask)
    x = torch.randn(2, 2, LENGTH)
    paths = Paths(Task.of(net, batches=[x]))
    found = paths.connectivity(mask)
    assert found.live == live == masks.live(net, mask, x) == Mask(paths.live(mask))
    assert Mask(paths.joins(mask)) == joins
    assert found.connected == whole and (found.ends is None) == whole
    assert found.empty == tuple(name for name, part in mask.items() if not part.any())
    assert [(row.kept, row.live) for row in found.layers] == [(int(mask[n].sum()), int(live[n].sum())) for n in mask]


# ---- by its meaning


def without_constants(net: nn.Module) -> nn.Module:
    """In eval mode and float64, with all that adds a constant to a channel at 0."""
    for module in net.modules():
        for name in ("bias", "running_mean"):
            if isinstance(getattr(module, name, None), Tensor):
                getattr(module, name).data.zero_()
    return net.double().eval()


@pytest.mark.parametrize("name", ZOO)
def test_what_is_not_live_has_no_gradient_and_no_output_misses_it(name: str) -> None:
    net, x = without_constants(build(name)), inputs(name).double()
    params, generator = prunable(net), torch.Generator().manual_seed(0)
    share, channels = (
        (0.3, 0.6) if name in LIBRARIES else (0.6, 0.7)
    )  # few weights, and many channels without any: dead ends
    mask = Mask(
        {
            n: (torch.rand(p.shape, generator=generator) < share)
            & (torch.rand(p.shape[0], *[1] * (p.ndim - 1), generator=generator) < channels)
            for n, p in params.items()
        }
    )
    live = masks.live(net, mask, x)
    assert 0 < live.kept <= mask.kept and all(not bool((part & ~mask[n]).any()) for n, part in live.items())
    if name not in ("odd", "timm/fused", "pre_activation"):  # group norms mix, residual streams have no dead channel
        assert live.kept < mask.kept
    mask.apply_(params)
    out = logits(net, x)
    out.square().sum().backward()
    for n, param in params.items():
        assert not bool(param.grad[mask[n] & ~live[n]].any()), n  # type: ignore[index]
    live.apply_(params)
    assert torch.equal(logits(net, x), out)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "functional", "depthwise"])
def test_norms_that_train_on_batches_change_nothing(name: str) -> None:
    net, x = without_constants(build(name)).train(), inputs(name).double()
    params = prunable(net)
    mask = Mask({n: torch.rand(p.shape) < 0.3 for n, p in params.items()})
    live = masks.live(net, mask, x)
    mask.apply_(params)
    logits(net, x).square().sum().backward()
    assert 0 < live.kept < mask.kept
    assert not any(bool(param.grad[mask[n] & ~live[n]].any()) for n, param in params.items())  # type: ignore[index]


# ---- where everything lives


def few(net: nn.Module) -> Mask:
    """One weight in each output of each layer, all of the same input."""
    return Mask({n: F.one_hot(torch.zeros(p.shape[0]).long(), p.shape[1]).bool() for n, p in prunable(net).items()})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.mix, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.head(self.mix(x, x, x)[0].mean(1))


class Products(nn.Module):
    """Attention by hand: products of two things that both come from the input, and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.queries, self.values, self.head = (nn.Linear(a, 8) for a in (4, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        weights = (self.queries(x) @ x.transpose(1, 2)).softmax(-1)
        return self.head(weights @ self.values(x)).mean(1)


@pytest.mark.parametrize(
    "make",
    [
        Attention,
        Products,
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 3)),
    ],
)
def test_where_numbers_mix_all_that_goes_in_lives(make: Any) -> None:
    net = make()
    x = torch.randn(2, 5, 4)
    with warnings.catch_warnings(action="ignore"):
        live = masks.live(net, few(net), x)
    into = "into.weight" if "into.weight" in live else "0.weight"
    assert bool(live[into].equal(few(net)[into])) and live[into].sum() == 8


def test_group_norm_mixes_its_groups_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))
    mask = Mask({"0.weight": torch.ones(4, 1, 1, 1), "2.weight": torch.tensor([1, 0, 0, 0]).view(1, 4, 1, 1)})
    assert masks.live(net, mask, torch.randn(2, 1, 3, 3))["0.weight"].flatten().tolist() == [True, True, False, False]


class ByNumpy(torch.autograd.Function):
    """The numbers in reverse, made where torch does not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[..., ::-1].copy())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].flip(-1)


class ByTorch(ByNumpy):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(-1)


class Between(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(2, 3), nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x).relu()))


def test_a_function_that_torch_cannot_show_counts_as_read() -> None:
    """The second layer reads the third number of the first one only, which no input reaches, or the first in reverse."""
    x, mask = torch.randn(2, 2), Mask({"first.weight": torch.eye(3, 2), "second.weight": torch.eye(3)[[0, 0]]})
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.trace(lambda x: x.flip(-1), torch.randn(2, 3))
    for function in (ByNumpy.apply, scripted):
        found = Paths(Task.of(Between(function), batches=[x])).connectivity(mask)
        assert found.connected and found.live == mask and found.lost
    for function in (ByTorch.apply, lambda x: x.flip(-1), lambda x: x[..., [2, 1, 0]]):
        found = Paths(Task.of(Between(function), batches=[x])).connectivity(mask)
        assert not found.connected and found.ends == "second.weight" and not found.lost


# ---- layers that are not run, functions in place of modules


def test_layers_that_are_not_run_count_as_live_and_functions_as_what_they_do() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.unused, self.head = (nn.Linear(3, 3, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b = F.linear(x, self.stem.weight).chunk(3, -1)[:2]
            x = torch.stack([a, b, a * 2], -1).squeeze(1)
            return torch.einsum("bi,oi->bo", torch.where(x > 0, x @ self.body.weight.t(), -x), self.head.weight)

    net = Net()
    mask = Mask({n: torch.eye(3) for n in ("stem.weight", "body.weight", "unused.weight", "head.weight")})
    found = Paths(Task.of(net, batches=[torch.randn(2, 3)])).connectivity(mask)
    assert found.unseen == ("unused.weight",) and found.live["unused.weight"].equal(mask["unused.weight"])
    assert found.live["stem.weight"].int().diag().tolist() == [1, 1, 0]  # nobody reads the third
    assert found.live["body.weight"].equal(mask["body.weight"])


def test_a_disconnected_network_says_where_its_last_path_ends() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    mask = Mask(
        {"0.weight": torch.eye(2), "2.weight": torch.tensor([[1, 0], [0, 0]]), "4.weight": torch.tensor([[0, 1]])}
    )
    found = Paths(Task.of(net)).connectivity(mask)
    assert not found.connected and found.ends == "4.weight" and found.live.kept == 0
    assert [(row.constant, row.unread, row.dead) for row in found.layers] == [(0, 2, 2), (1, 1, 2), (1, 0, 1)]


def test_a_network_that_does_not_run_is_an_error_that_asks_for_batches() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b.view(7, 3))

    with pytest.raises(
        TostError, match=r"connectivity: expected a network that runs on one batch, got .*; pass batches"
    ):
        masks.live(Odd(), Mask({"fc.weight": torch.ones(2, 3)}))


def test_what_is_no_mask_is_refused() -> None:
    refused(lambda: masks.live(nn.Linear(2, 1), None), "live: expected a mask", "got NoneType")
