"""Rescaled initialisation against a plain restatement of its formula, and what it must leave alone."""

import copy
import json
import logging
import math
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from tost_plugins import Session
from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import RescaledInit, rescale

INF = float("inf")
RANK = Path(__file__).resolve().parents[1] / "ranks" / "rescaled_init.py"
Batches = list[tuple[Tensor, Tensor]]


def tiny() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    with torch.no_grad():
        net[1].bias.uniform_(-1, 1)
        net[3].weight.mul_(3)
    return net


def data(count: int = 3, size: int = 8) -> Batches:
    return [(torch.randn(size, 5), torch.randint(3, (size,))) for _ in range(count)]


def half_mask(net: nn.Module) -> dict[str, Tensor]:
    """A mask of every other weight, applied to the network."""
    mask = {}
    for name, param in Task.of(net).params.items():
        mask[name] = (torch.arange(param.numel()) % 2 == 0).view(param.shape)
        param.data.mul_(mask[name])
    return mask


def plain_loss(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of `tiny`, written out."""
    w1, gain, shift, w2, b2 = theta
    h = x @ w1.T
    h = (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5) * gain + shift
    return F.cross_entropy(h.clamp(min=0) @ w2.T + b2, y)


def restated(
    net: nn.Module,
    mask: dict[str, Tensor],
    batches: Batches,
    norm: float,
    iterations: int = 3,
    look_ahead: float = 0.3,
    learning_rate: float = 0.05,
    masked_step: bool = True,
) -> tuple[list[float], list[str]]:
    """GradInit's iteration with ordinary autograd: the scales, and which objective each iteration had."""
    start = [param.detach().clone() for param in net.parameters()]
    masks = [mask.get(name, torch.tensor(1.0)) for name, _ in net.named_parameters()]
    scales = torch.ones(len(start), requires_grad=True)
    adams = {kind: torch.optim.Adam([scales], lr=learning_rate) for kind in ("norm", "loss")}
    kinds = []
    for i in range(iterations):
        (x, y), (x2, y2) = batches[i % len(batches)], batches[(i + 1) % len(batches)]
        theta = [scale * weight for scale, weight in zip(scales, start, strict=True)]
        grads = torch.autograd.grad(plain_loss(theta, x, y), theta, create_graph=True)
        grads = [grad * m for grad, m in zip(grads, masks, strict=True)] if masked_step else grads
        length = torch.sqrt(sum((grad**2).sum() for grad in grads))
        kinds.append("norm" if length > norm else "loss")
        if kinds[-1] == "norm":
            objective = length
        else:
            moved = [value - look_ahead * grad for value, grad in zip(theta, grads, strict=True)]
            objective = plain_loss(moved, torch.cat([x[:4], x2[4:]]), torch.cat([y[:4], y2[4:]]))
        (slope,) = torch.autograd.grad(objective, scales)
        scales.grad = slope.clamp(-1, 1)
        adams[kinds[-1]].step()
        scales.data.clamp_(min=0.01)
    return scales.tolist(), kinds


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(1e-6, {"norm"}), (INF, {"loss"}), (1.45, {"norm", "loss"})],
    ids=["norm", "loss", "both"],
)
def test_equals_the_formula_written_with_ordinary_autograd(norm: float, expected: set[str]) -> None:
    net, batches = tiny(), data()
    mask = half_mask(net)
    wanted, kinds = restated(net, mask, batches, norm, iterations=5)
    assert set(kinds) == expected, kinds
    found = rescale(Task.of(net, batches=batches), mask, iterations=5, learning_rate=0.05, look_ahead=0.3, norm=norm)
    assert list(found) == [name for name, _ in net.named_parameters()]
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [1e-6, INF])
def test_gradient_is_masked_first(norm: float) -> None:
    net, batches = tiny(), data()
    mask = half_mask(net)
    right, _ = restated(net, mask, batches, norm)
    wrong, _ = restated(net, mask, batches, norm, masked_step=False)
    options = {"iterations": 3, "learning_rate": 0.05, "look_ahead": 0.3, "norm": norm}
    found = list(rescale(Task.of(net, batches=batches), mask, **options).values())
    assert found == pytest.approx(right, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(found, wrong, strict=True)) > 1e-3


def test_initial_values_are_only_scaled_and_pruned_weights_stay_zero() -> None:
    net = tiny()
    mask = half_mask(net)
    before = copy.deepcopy(net.state_dict())
    RescaledInit(iterations=6, learning_rate=0.1).start(Task.of(net, batches=data()), mask)
    for name, param in net.named_parameters():
        there = before[name] != 0
        assert torch.equal(param != 0, there)
        ratios = param[there] / before[name][there]
        assert (ratios > 0).all()
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
        assert (ratios.detach() - 1).abs().min() > 1e-3
    assert set(net.state_dict()) == set(before)


def test_mask_is_applied_even_if_the_weights_are_not_masked_yet() -> None:
    net, batches = tiny(), data()
    dense = copy.deepcopy(net)
    mask = half_mask(net)
    a = rescale(Task.of(net, batches=batches), mask, iterations=2)
    assert a == rescale(Task.of(dense, batches=batches), mask, iterations=2)
    assert a != rescale(Task.of(dense, batches=batches), {}, iterations=2)


@pytest.mark.parametrize("least", [0.7, 1.0])
def test_scales_do_not_fall_below_min_scale(least: float) -> None:
    found = rescale(Task.of(tiny(), batches=data()), {}, iterations=20, learning_rate=0.1, norm=1e-6, min_scale=least)
    assert min(found.values()) == pytest.approx(least)


def test_model_random_states_and_loader_look_untouched() -> None:
    net = tiny().train()
    net[1].eval()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        TensorDataset(torch.randn(20, 5), torch.randint(3, (20,))), 4, shuffle=True, generator=generator
    )
    for param in net.parameters():
        param.grad = torch.full_like(param, 7)
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    of_loader = generator.get_state()
    scales = rescale(Task.of(net, batches=loader), {}, iterations=7)
    assert min(scales.values()) < 1
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all((param.grad == 7).all() and param.is_leaf for param in net.parameters())
    assert modes == [module.training for module in net.modules()]
    assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2]
    assert torch.equal(generator.get_state(), of_loader)


def test_dropout_draws_the_same_whatever_ran_before() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    task = Task.of(net, batches=data())
    first = rescale(task, {}, iterations=3)
    torch.rand(5)
    assert rescale(task, {}, iterations=3) == first


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("norm", [1e-6, INF])
def test_not_finite_is_an_error_that_leaves_the_model_alone(bad: int, norm: float) -> None:
    net, batches = tiny(), data()
    batches[bad][0][5, 2] = INF
    before = copy.deepcopy(net.state_dict())
    # The look-ahead step of the first iteration sees the second half of the second batch.
    iteration = 1 if norm == INF else bad + 1
    what = f"rescaled_init, iteration {iteration}: expected a finite loss .*, got .*nan.*; check the data"
    with pytest.raises(TostError, match=what):
        RescaledInit(iterations=3, norm=norm).start(Task.of(net, batches=batches), {})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


def test_first_step_does_more_good_on_a_badly_scaled_network() -> None:
    def loss_after_step(net: nn.Module) -> float:
        net = copy.deepcopy(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        return F.cross_entropy(net(x), y).item()

    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for layer, scale in ((0, 5), (2, 5), (4, 20)):
            net[layer].weight.mul_(scale)
    x = torch.randn(64, 5)
    y = x[:, :3].argmax(1)
    mask = half_mask(net)
    plain = loss_after_step(net)
    RescaledInit(iterations=100, learning_rate=0.02).start(
        Task.of(net, batches=[(x[:32], y[:32]), (x[32:], y[32:])]), mask
    )
    assert loss_after_step(net) < 0.5 * plain


def test_bias_in_front_of_a_norm_keeps_its_values() -> None:
    """Its true slope is 0; Adam would turn rounding noise into full steps."""
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    assert rescale(Task.of(net, batches=data()), {}, iterations=5)["0.bias"] == 1.0


def test_frozen_zero_and_added_parameters_are_left_out_and_tied_ones_counted_once() -> None:
    net = tiny()
    net[0].weight.requires_grad_(False)
    net.append(nn.Linear(3, 3))
    net.append(nn.Linear(3, 3))
    net[5].weight = net[4].weight
    nn.init.zeros_(net[4].bias)
    net[4].extra = ghost = nn.Linear(3, 3)
    ghost.tost_ghost = True
    found = rescale(Task.of(net, batches=data()), {}, iterations=2)
    assert list(found) == ["1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "5.bias"]
    assert found["4.bias"] == 1.0 and found["4.weight"] != 1.0
    net.requires_grad_(False)
    with pytest.raises(TostError, match=r"expected parameters that require grad, got none in Sequential; unf"):
        rescale(Task.of(net, batches=data()), {}, iterations=2)


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        (None, "rescaled_init: expected batches to look at, got None; pass batches="),
        ([], "batches: expected at least one batch, got an empty loader; check batch_size"),
        (
            iter(data()),
            "batches: expected something that can be read twice, got a one-shot list_iterator; pass",
        ),
        (
            [(torch.randn(4, 5),)],
            "rescaled_init, iteration 1: batch: expected a pair .inputs, labels. or a dict",
        ),
    ],
)
def test_batches_that_cannot_serve_are_an_error(batches: object, what: str) -> None:
    with pytest.raises(TostError, match=what):
        RescaledInit(iterations=2).start(Task.of(tiny(), batches=batches), {})


class Counting:
    """Batches that can be read again and again, and counts how many were made."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.made = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.made += 1
            yield batch


def test_batches_are_read_as_needed_and_again_when_they_end() -> None:
    many, two = Counting(data(50)), Counting(data(2))
    rescale(Task.of(tiny(), batches=many), {}, iterations=4)
    assert many.made <= 6  # a look, four iterations, and the one that follows
    rescale(Task.of(tiny(), batches=two), {}, iterations=4)
    assert two.made <= 6
    with pytest.raises(TostError, match="expected at least one batch, got an empty loader"):
        rescale(Task.of(tiny(), batches=Counting([])), {}, iterations=4)


class Notes(list):
    """A kind of list of our own: what is put into a plain one while somebody only looks is taken out again."""


class Named(nn.Module):
    """Takes and gives dicts, as the models of transformers do, and computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()
        self.seen = Notes()

    def forward(self, pixel_values: Tensor, labels: Tensor, note: str, weight: Tensor) -> dict[str, Tensor]:
        assert note == "kept" and weight.shape == (3,)
        self.seen.append((pixel_values.shape[0], labels.detach().clone()))
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels, weight), "logits": logits}


def test_dict_batches_and_batches_of_unequal_size() -> None:
    net = Named()
    batches = [{"pixel_values": torch.randn(n, 5), "labels": torch.full((n,), n % 3), "note": "kept"} for n in (8, 4)]
    batches = [{**batch, "weight": torch.ones(3)} for batch in batches]
    found = rescale(Task.of(net, batches=batches), {}, iterations=1, norm=INF)
    assert "net.0.weight" in found
    assert net.seen[1][0] == 6  # the look-ahead: half of 8 and half of 4
    assert net.seen[1][1].tolist() == [2, 2, 2, 2, 1, 1]


def test_samples_of_two_shapes_are_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    batches = [(torch.randn(4, 1, size, size), torch.randint(3, (4,))) for size in (5, 6)]
    with pytest.raises(TostError, match=r"expected samples of one shape, got \(1, 5, 5\) and \(1, 6, 6\); pass"):
        rescale(Task.of(net, batches=batches), {}, iterations=1, norm=INF)


class Once(torch.autograd.Function):
    """Written without what torch.func needs."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_network_that_torch_func_cannot_differentiate_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(5, 3), Custom())
    with pytest.raises(Inapplicable, match=r"expected a network that can be differentiated twice.*; leave"):
        rescale(Task.of(net, batches=data()), {}, iterations=1)


def test_a_loss_that_asks_a_network_with_norms_in_training_mode_is_an_error() -> None:
    """A discriminator, or a perceptual loss, beside the generator that is looked at."""
    judge = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    task = Task.of(net, batches=data(), criterion=lambda fake, batch: judge(fake).square().mean())
    with pytest.raises(
        Inapplicable, match=r"expected a loss that changes no tensor in place, .*; call eval\(\) on that one"
    ):
        rescale(task, {}, iterations=1)
    judge.eval()
    assert len(rescale(task, {}, iterations=1)) == 4


def test_hardsigmoid_of_mobilenet_v3_works() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Hardsigmoid(), nn.Linear(6, 4), nn.Hardswish(), nn.Linear(4, 3))
    same = copy.deepcopy(net)
    same[1] = nn.Hardtanh(0, 1)
    same.insert(1, Sixth())
    batches = data()
    found = rescale(Task.of(net, batches=batches), {}, iterations=3)
    wanted = rescale(Task.of(same, batches=batches), {}, iterations=3)
    assert list(found.values()) == pytest.approx(list(wanted.values()))


class Sixth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 6 + 0.5


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tost_plugins"):
        rescale(Task.of(tiny(), batches=data()), {}, iterations=2, norm=INF)
    (record,) = caplog.records
    assert record.name == "tost_plugins"
    for part in (
        "rescaled_init: 5 tensors scaled by 0.9",
        "one step ahead",
        "above inf in 0 of 2 iterations",
    ):
        assert part in record.getMessage()


def test_set_up_costs_a_twentieth_of_the_run_at_most(caplog: pytest.LogCaptureFixture) -> None:
    def iterations(steps: int | None, **options: int) -> str:
        caplog.clear()
        task = Task.of(tiny(), batches=data(), steps=steps)
        with caplog.at_level(logging.INFO, logger="tost_plugins"):
            RescaledInit(**options).start(task, {})
        return caplog.records[0].getMessage().partition(" of ")[2]

    assert iterations(600) == "5 iterations (in place of 180: they may cost 5% of the run's 600 steps)"
    assert iterations(1).startswith("1 iterations (in place of 180")
    assert iterations(600, iterations=9) == "9 iterations"
    assert "may cost" not in iterations(None) + iterations(10**6)


def test_iterations_end_where_the_objective_falls_no_more(caplog: pytest.LogCaptureFixture) -> None:
    def line(count: int | None = None, norm: float = 1.0, learning_rate: float = 1e-12) -> str:
        torch.manual_seed(0)
        task = Task.of(tiny(), batches=data(1))  # one batch again and again, and scales that hardly move
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tost_plugins"):
            rescale(task, {}, iterations=count, norm=norm, learning_rate=learning_rate)
        return caplog.records[0].getMessage()

    for norm in (1e-6, INF):
        assert line(norm=norm).endswith(" of 40 iterations (in place of 180: the objective no longer falls)")
        assert line(60, norm).endswith(" of 60 iterations")  # as many as were asked for
    falling = line(norm=1e-6, learning_rate=1e-4)
    assert falling.endswith(" of 180 iterations"), falling


def test_an_iteration_costs_what_its_arithmetic_costs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    batches = [(torch.randn(4, 3, 10, 10), torch.arange(4) % 3) for _ in range(2)]
    with FlopCounterMode(display=False) as step:
        F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    for norm, steps in ((1e-6, 3.5), (INF, 4.5)):  # a gradient and a product with the Hessian; then one more gradient
        with FlopCounterMode(display=False) as counted:
            rescale(Task.of(net, batches=batches), {}, iterations=3, norm=norm)
        assert 0 < counted.get_total_flops() <= 3 * steps * step.get_total_flops()


def test_what_is_wrong_with_the_loss_is_said_before_the_mask_is_looked_for() -> None:
    class Never(nn.Module):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            raise TostError("loss: expected nothing, got something; leave it")

    net = tiny()
    looked = []
    net.register_forward_pre_hook(lambda *_: looked.append(1))
    for optional in (False, True):
        recipe = {
            "mask": {"kind": "snip", "sparsity": 0.5},
            "tweaks": [{"kind": "rescaled_init", "iterations": 1, "optional": optional}],
        }
        session = Session(copy.deepcopy(net), recipe).attach()
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.1)
        looked.clear()
        with pytest.raises(TostError, match="rescaled_init: loss: expected nothing" if not optional else "mask snip"):
            session.start(optimizer, data(), loss_fn=Never(), total_steps=10)
        assert len(looked) == 1 + optional


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"min_scale": 0},
        {"min_scale": 1.1},
        {"look_ahead": 0},
        {"look_ahead": math.nan},
        {"learning_rate": INF},
        {"norm": -1},
        {"clip": 0},
        {"steps": 3},
    ],
    ids=str,
)
def test_settings_are_checked_where_they_are_made(wrong: dict) -> None:
    with pytest.raises(TostError, match=r"^RescaledInit: "):
        RescaledInit(**wrong)


def test_defaults_of_the_function_are_those_of_the_tweak() -> None:
    tweak = RescaledInit()
    assert all(getattr(tweak, name) == value for name, value in (rescale.__kwdefaults__ or {}).items())
    assert (tweak.kind, tweak.optional, tweak.iterations, tweak.min_scale) == (
        "rescaled_init",
        False,
        None,
        0.01,
    )
    assert tweak.metrics(tiny()) == {} and tweak.attach(tiny(), 0) is None and tweak.companions(tiny()) == []


def test_networks_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(4, (4,))) for _ in range(2)]
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small"):
        net = getattr(models, name)(num_classes=4)
        mask = half_mask(net)
        before = {key: value.clone() for key, value in net.named_buffers()}
        RescaledInit(iterations=1, norm=INF).start(Task.of(net, batches=batches), mask)
        assert all(torch.equal(value, before[key]) for key, value in net.named_buffers())


def test_network_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4)
    net = transformers.ResNetForImageClassification(config)
    batches = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4)} for _ in range(2)]
    mask = half_mask(net)
    RescaledInit(iterations=2).start(Task.of(net, batches=batches), mask)
    assert all(bool((param[~mask[name]] == 0).all()) for name, param in Task.of(net).params.items())


def test_two_ranks_find_what_one_finds_on_all_their_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(RANK), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(RANK.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    # Halves of the joint batches must consist of the halves of the ranks' batches.
    script = runpy.run_path(str(RANK))
    halves = zip(script["batches"](0), script["batches"](1), strict=True)
    joint = [
        tuple(torch.cat([a[:2], b[:2], a[2:], b[2:]]) for a, b in zip(one, two, strict=True)) for one, two in halves
    ]
    for norm, found in zip((1e-6, 1.5, INF), first, strict=True):
        assert found == pytest.approx(script["learn"](joint, norm), abs=1e-5)
