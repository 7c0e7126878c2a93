"""multiplicative: the factors by hand, what bounds them, and which optimizers can do with them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins import Mask, Recipe, Session, TostError
from tost_plugins.errors import Inapplicable
from tost_plugins.session.lasting import lasts
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task
from tost_plugins.tweaks.multiplicative import Multiplicative, exponents

ON = {"kind": "multiplicative", "warmup": "0ba"}
RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}


class Line(nn.Module):
    """Three weights (2, -1, 0.5), the last of them removed, whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1, bias=False)
        self.fc.weight.data = torch.tensor([[2.0, -1.0, 0.5]])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


GRADIENT = torch.tensor([[0.5, 0.5, 1.0]])
KEPT = Mask({"fc.weight": torch.tensor([[True, True, False]])})


def line(made: Any, steps: int = 1, **options: Any) -> Tensor:
    """The weights after so many steps with the same gradient."""
    net = Line()
    session = Session(net, {"mask": RANDOM, "tweaks": [{**ON, **options}]}, KEPT)
    optimizer = made(net.parameters())
    with session.drive(optimizer, total_steps=20):
        for _ in range(steps):
            optimizer.zero_grad()
            net(GRADIENT).sum().backward()
            optimizer.step()
    return net.fc.weight.detach()[0]


# ---- by hand


def test_factors_by_hand() -> None:
    (found,) = exponents([torch.tensor([2.0, -1.0, 0.0])], [torch.tensor([0.5, 0.5, 1.0])], [0.1], 1.0, 0.0, 5.0)
    torch.testing.assert_close(found, torch.tensor([-0.05, 0.05, 0.0]))
    (found,) = exponents([torch.tensor([2.0, -1.0])], [torch.tensor([0.5, 0.5])], [0.1], 1.0, 0.2, 5.0)
    torch.testing.assert_close(found, torch.tensor([-0.07, 0.03]))
    (found,) = exponents([torch.tensor([2.0, -1.0])], [torch.tensor([9.0, math.inf])], [0.1], 200.0, 0.0, 0.05)
    assert found.tolist() == pytest.approx([-0.05, 0.05])


def test_a_step_by_hand() -> None:
    """SGD first: 2 - 0.05 and -1 - 0.05; then the factors; the removed weight is 0."""
    found = line(lambda p: torch.optim.SGD(p, lr=0.1), strength=1.0, decay=0.0)
    torch.testing.assert_close(found, torch.tensor([1.95 * math.exp(-0.05), -1.05 * math.exp(0.05), 0.0]))
    found = line(lambda p: torch.optim.SGD(p, lr=0.1), strength=0.0, decay=0.2)
    torch.testing.assert_close(found, torch.tensor([1.95 * math.exp(-0.02), -1.05 * math.exp(-0.02), 0.0]))
    found = line(lambda p: torch.optim.SGD(p, lr=0.1), strength=200.0, most=0.01)
    torch.testing.assert_close(found, torch.tensor([1.95 * math.exp(-0.01), -1.05 * math.exp(0.01), 0.0]))
    assert torch.equal(line(lambda p: torch.optim.SGD(p, lr=0.0)), torch.tensor([2.0, -1.0, 0.0]))


def test_it_grows_over_its_warm_up() -> None:
    """Steps 0 to 4 of a warm-up of 4, by factors alone: the exponent's shares are 0, 1/4, 1/2, 3/4 and 1."""
    rates = {"lr": 0.1, "weight_decay": 0.0}
    plain = line(lambda p: torch.optim.SGD(p, **rates), steps=5, strength=0.0, decay=0.0)
    decayed = [
        line(lambda p: torch.optim.SGD(p, **rates), steps=steps, strength=0.0, decay=0.1, warmup="4ba")
        for steps in range(6)
    ]
    by_hand = torch.tensor([2.0, -1.0, 0.0])
    for step, found in enumerate(decayed):
        torch.testing.assert_close(found, by_hand)
        by_hand = (by_hand - 0.1 * GRADIENT[0] * KEPT["fc.weight"][0]) * math.exp(-0.01 * min(step / 4, 1))
    assert plain[0] == pytest.approx(2 - 5 * 0.05)


def test_the_learning_rate_is_that_of_the_weights_group_in_this_step() -> None:
    """A schedule that moves on behind each step, and groups of their own."""
    net = Line()
    other = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": other.parameters(), "lr": 9.0}, {"params": net.parameters(), "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    session = Session(net, {"mask": RANDOM, "tweaks": [{**ON, "strength": 1.0, "decay": 0.0}]}, KEPT)
    with session.drive(optimizer, total_steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            net(GRADIENT).sum().backward()
            optimizer.step()
            schedule.step()
    wanted = torch.tensor([1.95 * math.exp(-0.05), -1.05 * math.exp(0.05), 0.0])
    torch.testing.assert_close(net.fc.weight.detach()[0], wanted)


def test_an_optimizer_that_finds_its_rate_multiplies_it() -> None:
    class Free(torch.optim.SGD):
        """lr 1, and d, as Prodigy has them."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1.0)
            self.param_groups[0]["d"] = 0.1

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=0.1)

    found, wanted = line(Free), line(lambda p: torch.optim.SGD(p, lr=0.1))
    torch.testing.assert_close(found, wanted)


class Writing(torch.optim.SGD):
    """Uses its gradient's memory for the momentum, as Nesterov's steps do on GPUs, and leaves another's number there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            param.grad.neg_()


def test_the_gradient_is_the_one_that_the_optimizer_was_given() -> None:
    assert torch.equal(line(lambda p: Writing(p, lr=0.1)), line(lambda p: torch.optim.SGD(p, lr=0.1)))


class Clearing(torch.optim.SGD):
    """Gives its gradients' memory back."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.zero_grad()


def test_gradients_that_are_gone_after_the_step_were_there() -> None:
    assert torch.equal(line(lambda p: Clearing(p, lr=0.1)), line(lambda p: torch.optim.SGD(p, lr=0.1)))


def test_zeros_stay_and_signs_stay() -> None:
    net = Digits()
    session = Session(net, {"mask": RANDOM, "tweaks": [{**ON, "strength": 1e6, "most": 5.0}]}, None)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)  # hardly a step by itself
    with session.drive(optimizer, digits(1), total_steps=5):
        before = {name: param.detach().sign() for name, param in prunable(net).items()}
        for x, y in digits(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            for name, param in prunable(net).items():
                assert torch.equal(param.detach().sign(), before[name])


def test_hidden_weights_train_by_the_optimizer_alone() -> None:
    """One step under dnw: what is removed moves as it does without the tweak, what is kept does not."""
    found = []
    for tweaks in ([], [{**ON, "strength": 1.0}]):
        net = Digits(norm=False)
        session = Session(net, {"mask": {**MOVING["dnw"], "freeze": "1dur"}, "tweaks": tweaks}).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        session.start(optimizer, digits(1), total_steps=5)
        kept, (x, y) = dict(session.mask), digits(1)[0]
        F.cross_entropy(net(x), y).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        buffers = dict(net.named_buffers())
        found.append({n: (p + buffers[f"{n}_hidden"]).detach() for n, p in prunable(net).items()})
    for name, keep in kept.items():
        assert torch.equal(found[0][name][~keep], found[1][name][~keep])
        assert not torch.equal(found[0][name][keep], found[1][name][keep])


def test_frozen_weights_stay() -> None:
    net = Digits()
    session, optimizer = Session(net, {"mask": RANDOM, "tweaks": [ON]}), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(optimizer, digits(1), total_steps=2):
        net.body[0].weight.requires_grad_(False)
        before = net.body[0].weight.clone()
        x, y = digits(1)[0]
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert torch.equal(net.body[0].weight, before)
        assert 0 < session.metrics()["tost/multiplicative/exponent"] <= 0.05
    assert "tost/multiplicative/exponent" not in session.metrics()


def test_complex_weights_are_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False).to(torch.complex64), nn.Linear(4, 2, bias=False))
    session = Session(net, {"mask": RANDOM, "tweaks": [ON]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level("INFO"), session.drive(optimizer, total_steps=1):
        net[1](net[0](torch.ones(1, 3, dtype=torch.complex64)).real).sum().backward()
        optimizer.step()
    assert "multiplicative: left alone are 0.weight (complex: without a sign)" in caplog.text
    with pytest.raises(Inapplicable, match=r"multiplicative: expected weights that have a sign, got complex ones only"):
        Multiplicative().start(Task.of(net[0]), {})


def test_what_is_out_of_range_is_refused() -> None:
    for wrong in (
        {"strength": -1},
        {"decay": -0.1},
        {"most": 0},
        {"most": 5.1},
        {"warmup": "5"},
        {"strength": math.inf},
    ):
        with pytest.raises(TostError, match=rf"tweaks.0.{next(iter(wrong))}"):
            Recipe.from_dict({"mask": RANDOM, "tweaks": [{"kind": "multiplicative", **wrong}]})


# ---- optimizers that compute weights from numbers of their own


class Averaging(Optimizer):
    """Schedule-free: gradients are taken between a sequence of its own and the average of that."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for param in (param for param in group["params"] if param.grad is not None):
                base = self.state[param].setdefault("base", param.clone())
                base.sub_(param.grad, alpha=group["lr"])
                param.lerp_(base, 1 / (group["count"] + 1))


class Dual(Optimizer):
    """Dual averaging: where it began, less the sum of all gradients."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                begin, total = (
                    state.setdefault("begin", param.clone()),
                    state.setdefault("sum", torch.zeros_like(param)),
                )
                total.add_(param.grad)
                param.copy_(begin - group["lr"] * total)


class Rateless(torch.optim.SGD):
    """Without an lr in its group, as Adafactor with its own steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> None:
        pass


REFUSED = {
    "averaging": (Averaging, r"Averaging, which keeps weights of its own: of a change 11 steps leave \d+%"),
    "dual": (Dual, r"Dual, which keeps weights of its own: of a change 11 steps leave 0%"),
    "lbfgs": (torch.optim.LBFGS, "LBFGS, whose step follows from the way between its gradients"),
    "rateless": (Rateless, "Rateless, whose group has no learning rate `lr`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_optimizers_that_would_lose_the_factor_are_refused(case: str) -> None:
    made, why = REFUSED[case]
    net = Digits()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    session = Session(net, {"mask": RANDOM, "tweaks": [ON]})
    with pytest.raises(Inapplicable, match=rf"^multiplicative: expected an optimizer .*, got {why}; use another one"):
        session.begin(made(net.parameters()), digits(1), total_steps=3)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    session = Session(Digits(), {"mask": RANDOM, "tweaks": [{**ON, "optional": True}]})
    session.begin(made(session.model.parameters()), digits(1), total_steps=3)
    assert len(session.left_out) == 1 and session.left_out[0].startswith("multiplicative (expected an optimizer")
    assert list(session.tweaks) == [] and not hasattr(session.model, "tost_multiplicative")


@pytest.mark.parametrize(
    "made",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        torch.optim.NAdam,
        torch.optim.ASGD,
    ],
)
def test_with_optimizers_that_go_on_from_the_weights_a_change_lasts(made: Any) -> None:
    weight = nn.Parameter(torch.ones(3, 3, 2, 2))
    assert lasts(made([weight], lr=0.1), weight) == pytest.approx(1.0, abs=0.02)


def test_libraries_optimizers_that_average_are_found() -> None:
    optim, weight = pytest.importorskip("timm.optim"), nn.Parameter(torch.ones(3, 3))
    assert lasts(optim.create_optimizer_v2([weight], "madgrad", lr=0.1), weight) < 0.4
    assert lasts(optim.create_optimizer_v2([weight], "lamb", lr=0.1), weight) > 0.9
