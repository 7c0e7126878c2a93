"""Each scoring method against a plain restatement of its formula, on numbers worked by hand and on small
networks."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mask_nets import Pictures, batches, net
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks import MASKS, find, search
from tost_plugins.masks.balanced import balanced
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.grasp import Grasp
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.masks.methods.synflow import SynFlow
from tost_plugins.training.batches import pick, size_of
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task


def plain(seed: int = 0) -> nn.Module:
    """Without norms and dropout, in float64, so that sums do not depend on how samples are put together."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4))
    return nn.Sequential(*layers).double()


def data(count: int = 3, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in batches(count, size)]


def by_sort(scores: dict[str, Tensor], sparsity: float) -> Mask:
    """The mask of the highest scores over all layers, by a stable sort."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    order = flat.argsort(descending=True, stable=True)[: round((1 - sparsity) * len(flat))]
    kept = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order, True)
    parts = kept.split([score.numel() for score in scores.values()])
    return Mask({name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)})


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(mine) == list(other)
    for name, score in mine.items():
        torch.testing.assert_close(score, other[name], rtol=1e-9, atol=1e-15)


# Magnitude and random


def test_magnitude_is_a_sort_of_magnitudes() -> None:
    model = net()
    sizes = {name: param.detach().abs() for name, param in prunable(model).items()}
    assert find(model, "magnitude", 0.7) == by_sort(sizes, 0.7)


def test_random_draws_every_weight_alike() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    task, method = Task.of(model), MASKS["random"](sparsity=0.75, allocation="uniform")  # connected or not
    total = sum(search(method, task, seed)["0.weight"].int() for seed in range(800))
    # 800 draws of 5 of 20: 200 expected for each weight, with a standard deviation of 12.2.
    assert int(total.sum()) == 800 * 5
    assert bool(((total - 200).abs() < 60).all())


def test_random_follows_its_allocation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16))
    assert [int(m.sum()) for m in find(model, "random", 0.75).values()] == [6, 14]  # 20 as 8 to 20
    assert [int(m.sum()) for m in find(model, "random", 0.75, allocation="uniform").values()] == [4, 16]


# SNIP


def test_snip_by_hand() -> None:
    # loss = w . x with x = (3, 1, -2): g = x, |g * w| = (0.3, 2, 1.6)
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[0.1, 2.0, 0.8]])
    given = [(torch.tensor([[3.0, 1.0, -2.0]]), torch.zeros(1))]
    mask = find(model, "snip", 1 / 3, given, lambda out, y: out.sum())
    assert mask["weight"].tolist() == [[False, True, True]]


def test_snip_sums_magnitudes_over_batches() -> None:
    # The gradients of the two batches cancel, their magnitudes do not.
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    given = [(torch.tensor([[5.0, 1.0]]), None), (torch.tensor([[-5.0, 2.0]]), None)]
    task = Task.of(model, batches=given, criterion=lambda out, batch: out.sum())
    assert Snip(sparsity=0.5, batches=2).scores(task)["weight"].tolist() == [[10.0, 3.0]]
    assert Snip(sparsity=0.5, batches=9).scores(task)["weight"].tolist() == [[10.0, 3.0]]


def test_snip_is_its_formula_with_norms_in_train_mode() -> None:
    model = net().double()
    model[6].p = 0.0
    task = Task.of(model.eval(), batches=data())
    expected = {name: torch.zeros_like(param) for name, param in prunable(model).items()}
    for x, y in data()[:2]:
        own = copy.deepcopy(model).train()
        F.cross_entropy(own(x), y).backward()
        for name, param in prunable(own).items():
            expected[name] += (param.grad * param.detach()).abs()
    assert_close(Snip(sparsity=0.6, batches=2).scores(task), expected)
    assert find(model, Snip(sparsity=0.6, batches=2), batches=data()) == by_sort(expected, 0.6)


def test_snip_takes_the_loss_it_is_given_the_models_own_or_cross_entropy() -> None:
    model, (x, y) = plain(), data()[0]
    weights = prunable(model)

    def expected(loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(weights.values()))
        return {name: (grad * param).abs() for (name, param), grad in zip(weights.items(), grads, strict=True)}

    def scores(**rest: object) -> dict[str, Tensor]:
        return {n: s.requires_grad_(False) for n, s in Snip(sparsity=0.5).scores(Task.of(model, **rest)).items()}

    pair = [(x, y)]
    assert_close(scores(batches=pair), expected(F.cross_entropy(model(x), y)))
    margin = F.multi_margin_loss
    assert_close(scores(batches=pair, loss_fn=margin), expected(margin(model(x), y)))
    square = lambda outputs, batch: outputs.square().mean()  # noqa: E731
    assert_close(scores(batches=pair, criterion=square), expected(model(x).square().mean()))


# GraSP


def gradient_norm(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    params = list(prunable(model).values())
    return sum(grad.square().sum() for grad in torch.autograd.grad(loss(model), params))


def test_grasp_is_what_removal_does_to_the_norm_of_the_gradient() -> None:
    """Brute force: move each weight a little towards 0 and see how much |g|^2 changes."""
    x, y = data(1)[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = x.flatten(1)[:, :6]
    loss = lambda m: F.cross_entropy(m(x) / 2.0, y)  # noqa: E731
    scores = Grasp(sparsity=0.5, temperature=2.0, per_class=3).scores(Task.of(model, batches=[(x, y)]))
    step, before = 1e-5, gradient_norm(model, loss)
    for name, param in prunable(model).items():
        for i in range(param.numel()):
            moved = copy.deepcopy(model)
            prunable(moved)[name].data.view(-1)[i] *= 1 - step
            change = (gradient_norm(moved, loss) - before) / step
            assert abs(change - 2 * scores[name].view(-1)[i]) < 1e-4 * max(1, abs(change))


def test_grasp_keeps_more_gradient_than_the_opposite_choice() -> None:
    model, given = plain(), data(1)
    loss = lambda m: F.cross_entropy(m(given[0][0]), given[0][1])  # noqa: E731
    task = Task.of(model, batches=given)
    scores = Grasp(sparsity=0.1, temperature=1.0).scores(task)
    flow = {}
    for sign, name in ((-1, "grasp"), (1, "opposite")):
        pruned = copy.deepcopy(model)
        by_sort({n: sign * s for n, s in scores.items()}, 0.1).apply_(prunable(pruned))
        flow[name] = float(gradient_norm(pruned, loss).detach())
    assert find(model, Grasp(sparsity=0.1, temperature=1.0), batches=given) == by_sort(
        {n: -s for n, s in scores.items()}, 0.1
    )
    assert flow["grasp"] > 2 * flow["opposite"]


def test_grasp_by_hand() -> None:
    # loss = 0.5 * sum(c * w^2), c = (1, 2, -1): g = c * w, H = diag(c), S = -w * c * c * w = -(1, 4 * 4, 9).
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0]]).double()
    task = Task.of(
        model,
        batches=[(torch.eye(3).double(), torch.zeros(3).long())],
        criterion=lambda out, batch: 0.5 * (torch.tensor([1.0, 2.0, -1.0]).double() * out[:, 0] ** 2).sum(),
    )
    assert Grasp(sparsity=0.5, temperature=1.0).scores(task)["weight"].tolist() == [[-1.0, -16.0, -9.0]]


def test_grasp_of_a_loss_that_is_linear_in_the_weights_is_0() -> None:
    task = Task.of(nn.Linear(3, 4), batches=[(torch.rand(8, 3), torch.arange(8) % 4)], loss_fn=lambda out, y: out.sum())
    assert not Grasp(sparsity=0.5).scores(task)["weight"].any()


def test_grasp_needs_second_derivatives_and_finds_that_of_hardsigmoid() -> None:
    class Gate(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate(super().forward(x))

    scores = []
    raw = torch.ops.aten.hardsigmoid  # not seen as a function of torch.nn.functional
    for gate in (F.hardsigmoid, lambda x: (x + 3).clamp(0, 6) / 6, raw):
        torch.manual_seed(0)
        model = nn.Sequential(Gate(3, 4), nn.Linear(4, 4)).double()
        model[0].gate = gate
        given = [(torch.rand(12, 3).double(), torch.arange(12) % 4)]
        if gate == raw:
            with pytest.raises(TostError, match="grasp: expected a network that can be differentiated twice, got "):
                find(model, "grasp", 0.5, given)
        else:
            scores.append(Grasp(sparsity=0.5).scores(Task.of(model, batches=given)))
    assert_close(*scores)


@pytest.mark.parametrize("size", [12, 5, 36])
def test_grasp_does_not_depend_on_how_samples_come_in_batches(size: int) -> None:
    whole = [(torch.cat([x for x, _ in data()]), torch.cat([y for _, y in data()]))]
    cut = [(whole[0][0][i : i + size], whole[0][1][i : i + size]) for i in range(0, 36, size)]
    method = Grasp(sparsity=0.5, per_class=7)
    expected = method.scores(Task.of(plain(), batches=whole))
    assert_close(method.scores(Task.of(plain(), batches=cut)), expected)


def test_grasp_divides_logits_by_its_temperature_however_they_come() -> None:
    model = Pictures().double()
    for layer in (model.body[1], model.body[4]):
        layer.eval()
    model.body[6].p = 0.0
    dicts = [{"pixel_values": x, "labels": y} for x, y in data(1)]
    method = Grasp(sparsity=0.5, per_class=9, temperature=7.0)
    expected = {f"body.{name}": s for name, s in method.scores(Task.of(model.body, batches=data(1))).items()}
    assert_close(method.scores(Task.of(model, batches=dicts)), expected)
    given = Task.of(model, batches=dicts, loss_fn=lambda logits, y: F.cross_entropy(logits, y))
    assert_close(method.scores(given), expected)


def classes(found: list) -> list[int]:
    return torch.cat([y for _, y in found]).bincount(minlength=4).tolist()


def test_samples_are_balanced_and_come_in_batches_of_the_loaders_size(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.arange(40.0).repeat(3, 1).T.contiguous()
    y = torch.tensor([0] * 20 + [1] * 10 + [2] * 6 + [3] * 4)
    given = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    model = nn.Linear(3, 4)
    found = balanced(Task.of(model, batches=given), 4)
    assert classes(found) == [4, 4, 4, 4]
    assert [size_of(batch) for batch in found] == [8, 8]
    assert found[0][0][:, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        assert classes(balanced(Task.of(model, batches=given), 8)) == [8, 8, 6, 4]
    assert "2 of 4 classes have fewer than 8 samples" in caplog.text


def test_samples_are_not_sought_for_ever() -> None:
    class Endless:
        def __iter__(self):
            while True:
                yield torch.rand(50, 3), torch.arange(50) % 3

    assert classes(balanced(Task.of(nn.Linear(3, 4), batches=Endless()), 5)) == [5, 5, 5, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(6, 4), r"got torch\.float32 of shape \(6, 4\); use a mask method that needs no classes"),
        (torch.full((6,), -100), "expected samples with a class, got none; check the labels"),
        ([0] * 6, "one whole number per sample, got list"),
        (torch.zeros(24, dtype=torch.long), "one label for each of 6 samples, got 24 labels"),
    ],
)
def test_samples_without_a_class(labels: object, message: str) -> None:
    with pytest.raises(TostError, match=message):
        find(nn.Linear(3, 4), "grasp", 0.5, [(torch.rand(6, 3), labels)])


def test_pick_takes_rows_of_what_counts_samples() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "meta": (torch.arange(3), "abc"), "scale": torch.ones(2)}
    found = pick(batch, [2, 0])
    assert found["x"].tolist() == [[4, 5], [0, 1]]
    assert found["meta"][0].tolist() == [2, 0]
    assert (found["meta"][1], found["scale"].tolist()) == ("abc", [1, 1])
    assert size_of({"x": (torch.rand(7, 2),)}) == 7
    assert size_of("abc") == 1


# SynFlow


def test_synflow_by_hand() -> None:
    # R = |v| . |W| 1, so a weight's score is |v_i| |w_ij| and |v_i| sum_j |w_ij|:
    # W: 2 * (1, 3) and 1 * (4, 1); v: 2 * 4 and 1 * 5. One shot keeps 8, 6, 5; ties none.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, 3.0], [4.0, -1.0]])
    model[2].weight.data = torch.tensor([[-2.0, 1.0]])
    mask = find(model, "synflow", 0.5, rounds=1, input_shape=(2,))
    assert mask["0.weight"].tolist() == [[False, True], [False, False]]
    assert mask["2.weight"].tolist() == [[True, True]]
    # Weight by weight: 1 (row 2) goes, v becomes (8, 4); 2 (row 1) goes, v is (6, 4), W is 6 and 4; the first
    # of the 4s is the one that stays.
    slow = find(model, "synflow", 0.5, rounds=100, input_shape=(2,))
    assert slow["0.weight"].tolist() == [[False, True], [True, False]]
    assert slow["2.weight"].tolist() == [[True, False]]


def plain_synflow(model: nn.Module, sparsity: float, rounds: int, shape: tuple[int, ...]) -> Mask:
    """The published algorithm, with exact counts: |parameters|, eval mode, one input of ones."""
    model = copy.deepcopy(model).double().eval()
    for param in model.parameters():
        param.data.abs_()
    mask = Mask.dense(prunable(model))
    for turn in range(1, rounds + 1):
        model.zero_grad()
        model(torch.ones(1, *shape).double()).sum().backward()
        params = prunable(model).items()
        scores = {n: (p.grad * p.detach()).abs().masked_fill(~mask[n], -1) for n, p in params}
        last = round((1 - sparsity) * mask.size)
        mask = by_sort(scores, 1 - round((last / mask.size) ** (turn / rounds) * mask.size) / mask.size)
        mask.apply_(prunable(model))
    return mask


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.8, 7), (0.9, 100)])
def test_synflow_is_its_algorithm(sparsity: float, rounds: int) -> None:
    model = net()
    model[1].bias.data.normal_()
    model[1].weight.data.normal_()
    expected = plain_synflow(model, sparsity, rounds, (3, 8, 8))
    assert expected.kept == round((1 - sparsity) * 576)
    assert find(model, "synflow", sparsity, rounds=rounds, input_shape=(3, 8, 8)) == expected
    assert find(model, "synflow", sparsity, batches(), rounds=rounds) == expected
    dicts = [{"pixel_values": x, "labels": y} for x, y in batches()]
    wrapped = Pictures()
    wrapped.body = model
    found = find(wrapped, "synflow", sparsity, dicts, rounds=rounds)
    assert {name.removeprefix("body."): mask for name, mask in found.items()}.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name.removeprefix("body.")]) for name, mask in found.items())


def test_synflow_is_its_algorithm_where_it_empties_shortcuts() -> None:
    torch.manual_seed(0)
    model = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
    expected = plain_synflow(model, 0.98, 6, (3, 32, 32))
    assert [name for name, kept in expected.items() if not kept.any()] != []
    assert find(model, "synflow", 0.98, rounds=6, input_shape=(3, 32, 32)) == expected


def test_synflow_does_not_look_at_values() -> None:
    model = net()
    nan = [(torch.full_like(x, float("nan")), y) for x, y in batches()]
    assert find(model, "synflow", 0.8, nan, rounds=3) == find(model, "synflow", 0.8, batches(), rounds=3)


def test_synflow_does_not_lose_a_layer_where_one_shot_does() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 200), nn.Linear(200, 200), nn.Linear(200, 5)]
    model = nn.Sequential(*[layer for pair in zip(layers, [nn.ReLU()] * 3, strict=True) for layer in pair])
    with pytest.raises(TostError, match=r"expected a path of kept weights .* without any weight: 0.weight, 2.weight"):
        find(model, "synflow", 0.999, rounds=1)
    assert find(model, "synflow", 0.999, rounds=100).kept == 45


def test_synflow_keeps_the_allocation_it_is_given() -> None:
    mask = find(net(), "synflow", 0.75, batches(), rounds=10, allocation="uniform")
    assert [int(m.sum()) for m in mask.values()] == [54, 18, 72]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (net(), None),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "(3, 32, 32)",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 40, stride=40), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            "(1, 224, 224)",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "(12,)"),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)),
            "(2, 32)",
        ),
    ],
)
def test_synflow_finds_an_input_that_fits_and_says_which(
    model: nn.Module, shape: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tost_plugins")
    if shape is None:  # 8x8 images: neither of the usual sizes
        with pytest.raises(TostError, match=r"runs on an input of ones, got RuntimeError .*; pass input_shape="):
            find(model, "synflow", 0.5, rounds=1)
        return
    assert find(model, "synflow", 0.5, rounds=2, on_collapse="keep_one").sparsity == 0.5
    assert f"so the input is {shape}" in caplog.text


def test_synflow_of_a_network_that_needs_its_labels() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.fc(x)

    given = [{"labels": torch.zeros(5).long(), "x": torch.rand(5, 3)}]
    assert find(Strict(), "synflow", 0.5, given).kept == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(*[nn.Linear(64, 64) for _ in range(600)]), "the network is too deep for float64"),
        (nn.Sequential(nn.Linear(64, 64), nn.Tanh()), "got scores of 0 everywhere"),
    ],
)
def test_synflow_of_a_network_that_tells_it_nothing(model: nn.Module, message: str) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    with pytest.raises(TostError, match=message):
        find(model, SynFlow(sparsity=0.5, rounds=2))


@pytest.mark.parametrize("cap", [nn.ReLU6(), nn.Hardtanh(0, 6), F.relu6, nn.ReLU6(inplace=True)])
def test_synflow_is_not_blinded_by_caps(cap: Callable[[Tensor], Tensor]) -> None:
    class Act(nn.Module):
        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    def model(act: Callable[[Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 30), Act(act), nn.Linear(30, 30), Act(act), nn.Linear(30, 30))

    expected = find(model(F.relu), "synflow", 0.9, rounds=5)
    assert find(model(cap), "synflow", 0.9, rounds=5) == expected


def test_synflow_needs_inputs_that_are_floating_point() -> None:
    with pytest.raises(TostError, match=r"expected inputs that are floating point, got torch\.uint8; pass input_shape"):
        find(net(), "synflow", 0.5, [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2))])
    with pytest.raises(TostError, match=r"expected a batch with an input that is floating point, got the keys"):
        find(net(), "synflow", 0.5, [{"ids": torch.zeros(2, 3).long()}])
