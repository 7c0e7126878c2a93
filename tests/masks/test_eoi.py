"""Exact Orthogonal Initialization: how orthogonal, how dense, and what a run starts with."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks import Mask, find
from tost_plugins.masks.methods.eoi import sparse_orthogonal
from tost_plugins.session.session import Session


def drawn(rows: int, columns: int, count: int, seed: int = 0) -> Tensor:
    return sparse_orthogonal(rows, columns, count, torch.Generator().manual_seed(seed))


def off(matrix: Tensor) -> float:
    """How far the rows, or the columns of a matrix that is higher than wide, are from orthonormal."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return float((wide @ wide.T - torch.eye(len(wide))).abs().max())


def started(net: nn.Module, mask: Mask | None = None, **options: Any) -> Session:
    """A run of this network as it starts."""
    session = Session(net, {"mask": {"kind": "eoi", **options}, "tweaks": []}, mask)
    session.attach().start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4)
    return session


# ---- the matrix


def test_a_tenth_of_512_x_512_is_orthogonal_in_float32() -> None:
    net = nn.Linear(512, 512, bias=False)
    mask = started(net, sparsity=0.9).mask
    assert mask.kept == round(0.1 * 512 * 512) and net.weight.dtype == torch.float32
    assert off(net.weight.detach()) < 5e-7
    assert not net.weight[~mask["weight"]].any()
    assert 0 <= mask.kept - int(net.weight.count_nonzero()) < 2 * 512  # one rotation fills two columns at most


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (4, 10), (10, 4), (1, 7), (7, 1), (1, 1), (33, 20)])
def test_any_density_above_the_floor_is_orthogonal_and_within_one_rotations_step(rows: int, columns: int) -> None:
    floor, full = min(rows, columns), rows * columns
    for count in sorted({floor, (2 * floor + full) // 3, (floor + full) // 2, full}):
        found = drawn(rows, columns, count)
        step = 2 * min(rows, columns)
        assert found.shape == (rows, columns) and off(found) < 1e-13
        assert max(floor, count - step + 1) <= int(found.count_nonzero()) <= count
    assert int(drawn(rows, columns, full).count_nonzero()) == full


def test_the_floor_is_a_permutation_with_signs() -> None:
    found = drawn(20, 30, 20)  # density 1 / 30
    assert set(found.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert found.abs().sum(1).tolist() == [1] * 20 and float(found.abs().sum(0).max()) == 1
    assert not torch.equal(found.abs(), drawn(20, 30, 20, seed=1).abs())


def test_below_the_floor_some_rows_are_empty() -> None:
    found = drawn(6, 9, 4)
    assert int(found.count_nonzero()) == 4
    assert sorted(found.norm(dim=1).tolist()) == [0, 0, 1, 1, 1, 1] and float(found.abs().sum(0).max()) == 1
    assert not drawn(3, 3, 0).any()


def test_one_rotation_by_hand() -> None:
    assert int(drawn(2, 2, 3).count_nonzero()) == 2  # a rotation would add two
    matrix = drawn(2, 2, 4)
    (a, b), (c, d) = matrix.tolist()
    assert a**2 + b**2 == pytest.approx(1) and a * c + b * d == pytest.approx(0)
    assert abs(a) == pytest.approx(abs(d)) and abs(b) == pytest.approx(abs(c)) and 0 < abs(a) < 1
    row = drawn(1, 3, 2)
    assert int(row.count_nonzero()) == 2 and float(row.square().sum()) == pytest.approx(1)


def test_the_columns_of_a_sparse_one_are_filled_alike() -> None:
    filled = (drawn(200, 200, 8 * 200) != 0).sum(0)
    assert int(filled.min()) >= 4 and int(filled.max()) <= 16


# ---- the mask and the weights of a network


class Round(nn.Module):
    """A layer on a signal without an edge, so that a delta-orthogonal one keeps each sample's length exactly."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


CIRCULAR: dict[str, Any] = {"padding": 1, "padding_mode": "circular", "bias": False}
LAYERS = {
    "conv": (lambda: nn.Conv2d(12, 12, 3, **CIRCULAR), (12, 5, 5)),
    "wider": (lambda: nn.Conv1d(8, 12, 3, **CIRCULAR), (8, 6)),
    "groups": (lambda: nn.Conv2d(12, 18, 3, groups=3, **CIRCULAR), (12, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12, **CIRCULAR), (12, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 12, 3, groups=2, padding=1, bias=False), (12, 4, 4)),
    "even": (lambda: nn.Conv2d(12, 12, 2, stride=2, bias=False), (12, 4, 4)),
    "linear": (lambda: nn.Linear(20, 30, bias=False), (20,)),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.88])  # depthwise kernels of 9 keep one weight each at 0.88
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_lengths_at_every_density(name: str, sparsity: float) -> None:
    make, shape = LAYERS[name]
    net = Round(make())
    mask = started(net, sparsity=sparsity, allocation="uniform").mask
    assert mask.kept == round((1 - sparsity) * net.layer.weight.numel())
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    seen = x[..., 1::2, 1::2] if name == "even" else x  # one place of its four, the centre
    torch.testing.assert_close(net(x).flatten(1).norm(dim=1), seen.flatten(1).norm(dim=1))


def test_a_kernel_has_the_layers_density_at_its_centre_and_elsewhere() -> None:
    net = nn.Conv2d(40, 40, 3)
    mask, weight = started(net, sparsity=0.8).mask["weight"], net.weight.detach()
    shares = mask.float().mean((0, 1))
    assert abs(float(shares[1, 1]) - 0.2) < 0.01 and 0.15 < float(shares.min()) <= float(shares.max()) < 0.25
    elsewhere = weight.clone()
    elsewhere[:, :, 1, 1] = 0
    assert not elsewhere.any() and off(weight[:, :, 1, 1]) < 5e-7
    sparser = nn.Conv2d(40, 40, 3)  # a ninth of these are fewer than there are rows
    started(sparser, sparsity=1 - 60 / (9 * 1600))
    assert int(sparser.weight.count_nonzero()) <= 60 and off(sparser.weight[:, :, 1, 1].detach()) < 5e-7


def test_a_gain_stands_before_the_matrix_and_a_signal_survives_fifty_sparse_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(50)))
    plain, x = copy.deepcopy(net), torch.randn(8, 40)
    started(net, sparsity=0.9, allocation="uniform")
    torch.testing.assert_close(net(x).norm(dim=1), x.norm(dim=1))
    find(plain, "random", 0.9).apply_(dict(plain.named_parameters()))
    assert float(plain(x).norm()) < 1e-6 * float(x.norm())
    louder = nn.Linear(40, 40, bias=False)
    started(louder, sparsity=0.9, gain=math.sqrt(2))
    torch.testing.assert_close(louder(x).norm(dim=1), math.sqrt(2) * x.norm(dim=1))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))


def test_the_layers_keep_as_many_as_those_of_a_random_mask() -> None:
    for allocation in ("erk", "uniform", "global", {"0": 0.2}):
        options = {"sparsity": 0.7, "allocation": allocation}
        kept, wanted = find(small(), "eoi", **options), find(small(), "random", **options)
        assert kept.sparsities() == wanted.sparsities() and kept != wanted


def test_a_run_starts_with_the_matrices_and_find_gives_their_mask(caplog: pytest.LogCaptureFixture) -> None:
    net, own = small(), small()
    with caplog.at_level(logging.INFO):
        session = started(net, sparsity=0.7)
    assert session.mask == find(own, "eoi", 0.7)
    assert "2 layers start with weights that come with the mask" in caplog.text
    assert off(net[3].weight.detach()) < 5e-7 and torch.equal(net[0].bias, own[0].bias)
    again = small()
    started(again, sparsity=0.7)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_with_a_given_mask_or_the_networks_weights_these_stay() -> None:
    own, mask = small(), find(small(), "eoi", 0.7)
    for options, given in (({"sparsity": 0.7}, mask), ({"sparsity": 0.7, "weights": "network"}, None)):
        net = small()
        assert started(net, given, **options).mask == mask
        assert torch.equal(net[3].weight, own[3].weight * mask["3.weight"])


def test_layers_below_the_floor_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        find(small(), "eoi", 0.9, allocation={"3": 0.99})
    assert (
        "mask eoi: 1 layers keep fewer weights than they have rows" in caplog.text and "empty: 3.weight" in caplog.text
    )


def test_after_an_error_the_network_has_its_own_weights() -> None:
    net, own = small(), small()
    recipe = {"mask": {"kind": "eoi", "sparsity": 0.7}, "tweaks": [{"kind": "rescaled_init", "iterations": 1}]}
    batches = [(torch.full((4, 2, 5, 5), 1e30), torch.arange(4))]
    session = Session(net, recipe).attach()
    with pytest.raises(TostError, match="rescaled_init"):
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), batches, loss_fn=lambda out, y: (out**9).sum())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), own.parameters(), strict=True))


def test_a_half_precision_network_and_a_transposed_layer_of_the_hub() -> None:
    half = nn.Linear(32, 32, bias=False).bfloat16()
    assert started(half, sparsity=0.8).mask.kept == round(0.2 * 1024) and off(half.weight.detach()) < 2e-2
    hub = nn.Sequential(pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8))
    started(hub, sparsity=0.5)
    assert off(hub[0].weight.detach()) < 5e-7
