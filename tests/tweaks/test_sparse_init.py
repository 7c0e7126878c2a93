"""sparse_init: neurons scaled by the inputs they keep, layers brought close to an isometry, and what both leave alone."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks import Mask
from tost_plugins.masks import find as find_mask
from tost_plugins.session.session import Session
from tost_plugins.training.task import Task
from tost_plugins.tweaks.sparse_init import SparseInit, fan_in_scale, near_isometry


def started(net: nn.Module, mask: dict[str, Tensor], **options: Any) -> nn.Module:
    """The network as a run starts it: with the mask applied, then the tweak."""
    task = Task.of(net)
    Mask(mask).apply_(task.params)
    SparseInit(**options).start(task, mask)
    return net


def test_each_neuron_is_multiplied_by_the_root_of_its_fan_in_over_what_it_keeps() -> None:
    net = nn.Linear(4, 4)
    net.weight.data = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5], [-1, 1, -1, 1]])
    bias = net.bias.detach().clone()
    kept = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    started(net, {"weight": kept})
    root = 2**0.5
    wanted = torch.tensor([[0, 4, 0, 0], [root, 0, 0, 4 * root], [0, 0, 0, 0], [-1, 1, -1, 1]])
    torch.testing.assert_close(net.weight.detach(), wanted)
    assert torch.equal(net.bias, bias)
    assert fan_in_scale(torch.zeros(2, 3).bool()).tolist() == [[1], [1]]


def transposed_linear() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (1, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=False), (1, 4, 3, 3)),
    "Conv1D": (transposed_linear, (5, 4)),
}


def neuron_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Which output each weight feeds, in the weight's shape: seen from gradients, not from the layer's kind."""
    at = 1 if x.ndim > 2 else -1
    out = layer(x.abs() + 1)
    found = torch.full_like(layer.weight, -1)
    for index in range(out.shape[at]):
        (grad,) = torch.autograd.grad(out.select(at, index).sum(), layer.weight, retain_graph=True)
        found[grad != 0] = index
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_the_inputs_of_a_neuron_are_those_of_its_layer(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    nn.init.normal_(layer.weight)
    neuron = neuron_of(layer, torch.rand(shape))
    kept = torch.rand_like(layer.weight) < 0.4
    wanted = layer.weight.detach() * kept
    for index in neuron.unique():
        mine = neuron == index
        wanted[mine] *= (mine.sum() / kept[mine].sum().clamp(min=1)).sqrt()
    started(layer, {"weight": kept})
    torch.testing.assert_close(layer.weight.detach(), wanted)
    before = layer.weight.detach().clone()
    started(layer, {"weight": kept}, isometry="approximate", steps=5)
    assert not torch.equal(layer.weight, before) and not layer.weight[~kept].any()
    assert bool(layer.weight.isfinite().all())


def test_outputs_vary_as_in_the_dense_network() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(400, 50, bias=False), torch.randn(2000, 400)
    sparse = copy.deepcopy(dense)
    kept = torch.rand(50, 400) < torch.linspace(0.05, 1, 50)[:, None]
    started(sparse, {"weight": kept})
    ratios = sparse(x).std(0) / dense(x).std(0)
    assert float(ratios.min()) > 0.75 and float(ratios.max()) < 1.25 and abs(float(ratios.mean()) - 1) < 0.05
    masked = (x @ (dense.weight * kept).T).std(0) / dense(x).std(0)
    assert float(masked.min()) < 0.35


@pytest.mark.parametrize(("high", "wide"), [(24, 24), (16, 40), (40, 16)])
def test_half_of_the_weights_are_enough_to_come_close_to_an_isometry(high: int, wide: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, high, wide, generator=generator, dtype=torch.float64)
    kept = torch.rand(2, high, wide, generator=generator) < 0.5
    found, before, after = near_isometry(rows, kept, 300)
    assert not found[~kept].any() and after < 0.02 < 0.3 < before
    for matrix in found:
        product = matrix @ matrix.T if high <= wide else matrix.T @ matrix
        off = product - torch.eye(min(high, wide), dtype=torch.float64)
        assert float(torch.linalg.matrix_norm(off, 2)) < 0.1
    again = near_isometry(rows, kept, 300)
    assert torch.equal(again[0], found)


def test_rows_without_weights_stay_so_and_nothing_is_nan() -> None:
    rows = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(1, 6, 8).bool()
    nothing = near_isometry(rows, kept, 10)
    assert not nothing[0].any() and nothing[1:] == (0, 0)
    kept[0, 2, :4], kept[0, 4, 3:] = True, True
    found, before, after = near_isometry(rows, kept, 200)
    assert after < 1e-3 < before and not found[~kept].any()
    torch.testing.assert_close(found[0].norm(dim=1), torch.tensor([0, 0, 1, 0, 1.0, 0]), atol=1e-3, rtol=0)
    zeros = near_isometry(torch.zeros(1, 6, 8), kept, 10)
    assert not zeros[0].any()


def test_the_layers_norm_is_what_the_kept_fan_in_makes_of_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4), nn.Linear(4, 4))
    nn.init.zeros_(net[3].weight)
    mask = {name: torch.rand_like(param) < 0.3 for name, param in Task.of(net).params.items()}
    mask["0.weight"][2] = False
    scaled, close = started(copy.deepcopy(net), mask), started(copy.deepcopy(net), mask, isometry="approximate")
    for index in (0, 2):
        torch.testing.assert_close(close[index].weight.norm(), scaled[index].weight.norm())
        assert not torch.equal(close[index].weight, scaled[index].weight)
    assert not close[0].weight[2].any() and not close[3].weight.any()
    product = close[2].weight @ close[2].weight.T
    off = product / product.diagonal().mean() - torch.eye(4)
    assert float(off.abs().max()) < 0.05


def task_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))


def run_of(net: nn.Module, mask: dict[str, Any], tweak: dict[str, Any]) -> Session:
    session = Session(net, {"mask": mask, "tweaks": [{"kind": "sparse_init", **tweak}]})
    session.attach().start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4)
    return session


@pytest.mark.parametrize("isometry", [None, "approximate"])
def test_a_run_starts_with_these_weights_and_trains(isometry: str | None, caplog: pytest.LogCaptureFixture) -> None:
    net = task_net()
    with caplog.at_level(logging.INFO):
        session = run_of(net, {"kind": "random", "sparsity": 0.8}, {"isometry": isometry})
    assert "sparse_init: neurons of 2 layers scaled by" in caplog.text
    assert ("from an isometry" in caplog.text) == (isometry is not None)
    mask = find_mask(task_net(), "random", 0.8)
    assert session.mask == mask
    wanted = started(task_net(), dict(mask), isometry=isometry)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), wanted.parameters(), strict=True))


def test_weights_out_of_sight_are_scaled_like_those_beside_them() -> None:
    net = task_net()
    session = run_of(net, {"kind": "dnw", "sparsity": 0.5}, {"isometry": "approximate"})
    kept, plain = session.mask["4.weight"], task_net()[4].weight.detach()
    scale = fan_in_scale(kept)
    torch.testing.assert_close(net[4].weight_hidden[~kept], (plain * scale)[~kept])


def test_a_trained_network_is_refused_or_the_tweak_left_out() -> None:
    net = task_net()
    net(torch.randn(4, 1, 5, 5))
    with pytest.raises(
        TostError, match=r"sparse_init: expected a network that has not been trained, .* 1 batches; leave"
    ):
        run_of(copy.deepcopy(net), {"kind": "random", "sparsity": 0.8}, {})
    before = net[4].weight.detach().clone()
    session = run_of(net, {"kind": "random", "sparsity": 0.8}, {"optional": True})
    assert session.left_out == [
        "sparse_init (expected a network that has not been trained, got norms that have counted 1 batches)"
    ]
    assert torch.equal(net[4].weight, before * session.mask["4.weight"])
