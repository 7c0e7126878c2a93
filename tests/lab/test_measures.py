"""The measures of a network and its mask, against numbers that can be worked out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mask_nets import batches, net
from torch import nn

from tost_plugins import Mask, TostError, masks
from tost_plugins.lab.grid.starts import constant_sign, shuffled
from tost_plugins.lab.studies.curves import pswish
from tost_plugins.lab.studies.robustness import prune_further, reestimate_norms, robustness
from tost_plugins.session.watch.activations import activation_sparsity
from tost_plugins.session.watch.emergence import emergence
from tost_plugins.session.watch.in_degree import degrees, in_degree
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task


def test_in_degree_counts_by_hand() -> None:
    mask = {"conv": torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])}  # 2 units of 4
    (row,) = in_degree(mask)
    assert degrees(mask)["conv"].tolist() == [3, 0]
    assert (row["units"], row["inputs"], row["density"]) == (2, 4, 3 / 8)
    assert (row["mean"], row["std"], row["min"], row["max"], row["dead"]) == (1.5, 1.5, 0, 3, 1)
    assert row["binomial_std"] == pytest.approx(math.sqrt(4 * 3 / 8 * 5 / 8))
    assert row["binomial_dead"] == pytest.approx(2 * (5 / 8) ** 4)
    assert row["spread"] == pytest.approx(row["std"] / row["binomial_std"])


def test_the_in_degree_of_a_random_mask_follows_its_binomial() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    layer = nn.Linear(40, 5000, bias=False)
    mask = masks.find(layer, "random", 0.9)
    (row,) = in_degree(mask)
    assert row["spread"] == pytest.approx(1, abs=0.04)
    assert row["dead"] == pytest.approx(row["binomial_dead"], rel=0.15)
    seen = torch.bincount(degrees(mask)["weight"], minlength=41)[:12].double() / 5000
    assert seen.tolist() == pytest.approx(binom.pmf(range(12), 40, 0.1).tolist(), abs=0.02)


def test_a_structure_that_prefers_units_spreads_wider_than_the_binomial() -> None:
    keep = torch.zeros(100, 40, dtype=torch.bool)
    keep[:10] = True
    assert in_degree({"w": keep})[0]["spread"] > 5
    assert in_degree({"w": torch.ones(4, 4, dtype=torch.bool)})[0]["spread"] is None


def test_emergence_by_hand() -> None:
    bits = ([1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1])
    found = emergence({step: Mask({"w": torch.tensor([row])}) for step, row in zip((0, 5, 9), bits, strict=True)})
    assert [row["with_final"] for row in found] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0]
    assert [row["with_previous"] for row in found] == [None, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert found[0]["random"] == pytest.approx(1 / 3)  # each keeps 2 of 4: 1 in common on average, 3 in all
    with pytest.raises(TostError, match="at least one mask"):
        emergence({})


def test_the_random_overlap_is_that_of_random_masks() -> None:
    layer = nn.Linear(300, 300)
    a, b = (masks.find(layer, "random", 0.8, seed=seed) for seed in (1, 2))
    rows = emergence({0: a, 1: b})
    assert rows[0]["with_final"] == pytest.approx(rows[0]["random"], abs=0.005)


class Mixed(nn.Module):
    """A module, the same module again, and functional spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.inner = nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.relu(self.inner(self.relu(self.first(x)) - 0.1)) - 0.05)


def test_activation_sparsity_of_relu_equals_a_direct_count() -> None:
    model, data = Mixed(), [(torch.randn(16, 6), None) for _ in range(3)]
    rows = {(row["layer"], row["activation"]): row for row in activation_sparsity(model, data)}
    relu = functional = silu = 0
    for x, _ in data:
        first = F.relu(model.first(x))
        middle = model.inner(first - 0.1)
        second = F.relu(middle)
        relu += int((first == 0).sum() + (second == 0).sum())
        functional += int((F.relu(second - 0.05) == 0).sum())
        silu += int((middle.abs() < 1e-6).sum())
    assert rows["relu", "ReLU"]["zeros"] == pytest.approx(100 * relu / (2 * 3 * 16 * 8))
    assert rows["Mixed", "relu"]["zeros"] == pytest.approx(100 * functional / (3 * 16 * 8))
    assert rows["inner.1", "SiLU"]["zeros"] == pytest.approx(100 * silu / (3 * 16 * 8))
    assert len(rows) == 3 and 0 < relu < 2 * 3 * 16 * 8
    assert activation_sparsity(model, data, count=1)[0]["outputs"] == 2 * 16 * 8


def test_activation_sparsity_leaves_no_trace_and_needs_activations() -> None:
    model, data = net(), batches()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rows = activation_sparsity(model.train(), data)
    assert [row["layer"] for row in rows] == ["2", "5"] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not model[2]._forward_hooks
    with pytest.raises(TostError, match="expected activations"):
        activation_sparsity(nn.Linear(2, 2), [torch.zeros(1, 2)])


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        images, labels = batches(1, 60)[0]
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def test_pruning_by_nothing_changes_nothing_and_by_all_leaves_chance() -> None:
    model = net()
    masks.find(model, "random", 0.5).apply_(prunable(model))
    before = copy.deepcopy(model.state_dict())
    rows = robustness(model, accuracy, [0.0, 0.5, 1.0], batches(), draws=2)
    assert len(rows) == 3 * (1 + 2) * 2
    assert {r["accuracy"] for r in rows if r["share"] == 0 and r["norms"] == "kept"} == {accuracy(model)}
    assert {r["accuracy"] for r in rows if r["share"] == 1} == {25.0}  # one class for all: a quarter of four
    halves = [r["accuracy"] for r in rows if r["share"] == 0.5 and r["how"] == "random" and r["norms"] == "kept"]
    assert halves[0] != halves[1], "two draws that prune alike"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_prune_further_takes_exactly_its_share_of_what_is_left(how: str) -> None:
    model = net()
    mask = masks.find(model, "random", 0.5)
    mask.apply_(prunable(model))
    further = prune_further(prunable(model), mask, 0.3, how, torch.Generator().manual_seed(0))
    assert further.kept == mask.kept - round(0.3 * mask.kept)
    assert (further - mask).kept == 0
    if how == "magnitude":
        sizes = {name: weight.detach().abs() for name, weight in prunable(model).items()}
        gone = max(float(sizes[name][keep].max()) for name, keep in (mask - further).items() if keep.any())
        assert gone <= min(float(sizes[name][keep].min()) for name, keep in further.items() if keep.any())
    with pytest.raises(TostError, match="from 0 to 1"):
        prune_further(prunable(model), mask, 30)


def test_norms_are_estimated_over_all_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9), nn.BatchNorm1d(1)).eval()
    reestimate_norms(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
    assert model[0].running_mean.tolist() == [3.5] and model[0].running_var.tolist() == [5.0]
    assert model[2].running_mean.tolist() == pytest.approx([0], abs=1e-5)  # no dropout in between
    assert model[0].momentum == 0.1 and not model.training and not model[2].training


def test_shuffling_keeps_every_layers_count_and_nothing_else() -> None:
    mask = masks.find(net(), "snip", 0.6, batches=batches())
    other, again = (shuffled(mask, torch.Generator().manual_seed(3)) for _ in range(2))
    assert {n: int(k.sum()) for n, k in mask.items()} == {n: int(k.sum()) for n, k in other.items()}
    assert other != mask and other == again


def test_constant_sign_keeps_signs_and_deviation() -> None:
    weights = {"a": torch.tensor([[3.0, -1.0, 1.0, -3.0]]), "b": torch.ones(2)}
    made = constant_sign(weights, Mask({"a": torch.tensor([[True, True, False, False]])}))
    assert made.keys() == {"a"}
    assert made["a"].tolist() == [pytest.approx([5**0.5, -(5**0.5), 5**0.5, -(5**0.5)])]


def test_pswish_curves_meet_their_ends() -> None:
    rows = pswish([0.5, 1000.0])
    relu = [row["y"] for row in rows if row["curve"] == "ReLU"]
    sharp = [row["y"] for row in rows if row["curve"] == "beta 1000"]
    assert sharp == pytest.approx(relu, abs=1e-3) and relu[0] == 0 and relu[-1] == 4
    at_one = next(row["y"] for row in rows if row["curve"] == "beta 0.5" and row["x"] == pytest.approx(1))
    assert at_one == pytest.approx(1 / (1 + math.exp(-0.5)))


class Quadratic(nn.Module):
    """(w * x): its squared error on unit vectors has a diagonal Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_the_hessian_of_a_quadratic_has_its_known_eigenvalues() -> None:
    pytest.importorskip("scipy")
    from tost_plugins.session.watch.curvature import top_eigenvalues

    # the mean of (w_i * s_i)^2 over 5 samples: its Hessian is diagonal, with 2 * s_i^2 / 5
    model, scale = Quadratic(), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    data = [(torch.diag(scale), torch.zeros(5, 1))]
    assert top_eigenvalues(model, data, nn.MSELoss(), count=3) == pytest.approx([10, 6.4, 3.6], rel=1e-4)
    mask = {"layer.weight": torch.tensor([[True, True, True, True, False]])}
    assert top_eigenvalues(model, data, nn.MSELoss(), mask, count=2) == pytest.approx([6.4, 3.6], rel=1e-4)
    with pytest.raises(TostError, match="fewer eigenvalues"):
        top_eigenvalues(model, data, nn.MSELoss(), mask, count=3)


def test_the_top_eigenvalue_of_a_network_is_that_of_its_whole_hessian() -> None:
    pytest.importorskip("scipy")
    from tost_plugins.session.watch.curvature import curvature

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    data = [(torch.randn(20, 4), torch.arange(20) % 3)]
    mask = masks.find(model, "random", 0.4)
    mask.apply_(prunable(model))
    before = copy.deepcopy(model.state_dict())
    rows = {
        (row["space"], row["rank"]): row["eigenvalue"]
        for row in curvature(Task.of(model.train(), batches=data), mask, count=2)
    }

    def loss(flat: torch.Tensor) -> torch.Tensor:
        first, second = flat[:20].view(5, 4), flat[20:].view(3, 5)
        hidden = F.batch_norm(F.silu(F.linear(data[0][0], first, model[0].bias)), model[2].running_mean,
                              model[2].running_var, model[2].weight, model[2].bias)  # fmt: skip
        return F.cross_entropy(F.linear(hidden, second, model[4].bias), data[0][1])

    flat = torch.cat([weight.detach().flatten() for weight in prunable(model).values()])
    whole = torch.autograd.functional.hessian(loss, flat)
    kept = torch.cat([keep.flatten() for keep in mask.values()])
    for space, matrix in (("all weights", whole), ("kept weights", whole[kept][:, kept])):
        expected = torch.linalg.eigvalsh(matrix).tolist()[:-3:-1]
        assert [rows[space, 1], rows[space, 2]] == pytest.approx(expected, rel=2e-2)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
