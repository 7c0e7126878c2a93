"""Optimizers of other people's, alone, in each other and side by side: steps are counted, removed weights are exactly 0."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import refused
from moving_cases import Digits, digits
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins import Session, TostError
from tost_plugins.session.optimizer_state import numbers, start_values
from tost_plugins.training.params import prunable

STEPS = 9
MASKS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random", "sparsity": 0.6, "allocation": "uniform"},
    "set": {"kind": "set", "sparsity": 0.6, "every": "2ba", "until": "0.9dur"},
    "rigl": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "0.9dur"},
    "dnw": {"kind": "dnw", "sparsity": 0.6},
}


class Orthogonal(torch.optim.SGD):
    """The momentum of each matrix made orthogonal, as Muon does: dense, wherever the gradient was 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None and param.ndim > 1):
                u, _, v = torch.linalg.svd(param.grad.flatten(1) + 1e-6, full_matrices=False)
                param.grad.copy_((u @ v).view_as(param))
        super().step()


class Centred(torch.optim.SGD):
    """Gradient centralisation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None and param.ndim > 1):
                param.grad.sub_(param.grad.flatten(1).mean(1).view(-1, *[1] * (param.ndim - 1)))
        super().step()


class Neutral(Optimizer):
    """A sum that starts at 2 and divides: set to 0, it makes NaN of a weight that has no gradient yet."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                sums = self.state[param].setdefault("sums", {"square": torch.full_like(param, 2.0)})
                sums["square"].add_(param.grad**2)
                param.sub_(group["lr"] * param.grad / (sums["square"] - 1).sqrt())


class Rotated(Optimizer):
    """Second moments in a rotated basis, as SOAP keeps them: no number there stands for a single weight."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                flat = param.grad.flatten(1) if param.ndim > 1 else param.grad[None]
                generator = torch.Generator().manual_seed(flat.shape[1])
                basis = torch.linalg.qr(torch.randn(flat.shape[1], flat.shape[1], generator=generator))[0]
                turned = flat @ basis
                second = self.state[param].setdefault("second", torch.zeros_like(param))
                second.view_as(turned).lerp_(turned**2, 0.1)
                param.sub_(group["lr"] * (turned / (second.view_as(turned).sqrt() + 1e-8) @ basis.T).view_as(param))


class Lookahead(Optimizer):
    """Around another, pulling the weights back towards slow copies; its class calls no constructor of torch's."""

    def __init__(self, base: Optimizer, every: int = 2) -> None:
        self.base_optimizer, self.every, self.count = base, every, 0
        self.defaults, self.param_groups, self.state = base.defaults, base.param_groups, base.state
        self.slow = {p: p.detach().clone() for group in base.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()
        self.count += 1
        if self.count % self.every == 0:
            for param, slow in self.slow.items():
                param.copy_(slow.lerp_(param + 0.01, 0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)


class Sam:
    """Sharpness-aware minimisation by two calls; no torch optimizer itself."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.away = base, []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.away = [(param, 0.01 * param.grad.sign()) for param in params]
        for param, climb in self.away:
            param.add_(climb)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for param, climb in self.away:
            param.sub_(climb)
        self.base.step()

    step = second_step


class Own:
    """An optimizer that has nothing of torch's."""

    def __init__(self, params: Any) -> None:
        self.param_groups, self.state = [{"params": list(params)}], {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.sub_(0.05 * (param.grad + 0.1))

    def zero_grad(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.grad = None


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def two(params: Any) -> list[Optimizer]:
    params = list(params)
    matrices = [param for param in params if param.ndim > 1]
    return [sgd(matrices), torch.optim.AdamW([param for param in params if param.ndim < 2])]


MADE: dict[str, Callable[[Any], Any]] = {
    "orthogonal": lambda p: Orthogonal(p, lr=0.01, momentum=0.9),
    "centred": lambda p: Centred(p, lr=0.05, momentum=0.9),
    "neutral": lambda p: Neutral(p, lr=0.05),
    "rotated": Rotated,
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "lookahead": lambda p: Lookahead(sgd(p)),
    "lookahead in lookahead": lambda p: Lookahead(Lookahead(sgd(p), 3)),
    "two": two,
    "own": Own,
    "lookahead of own": lambda p: Lookahead(torch.optim.SGD(p, lr=0.05)),
}


def loop(net: nn.Module, made: Any, count: int = STEPS) -> Any:
    all_of_them = made if isinstance(made, list) else [made]
    for x, y in digits(count):
        for each in all_of_them:
            each.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for each in all_of_them:
            each.step()
        yield


def outside(session: Session) -> list[str]:
    return [n for n, p in prunable(session.model).items() if bool(p.detach()[~session.mask[n]].any())]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", MADE)
def test_every_step_is_counted_and_leaves_zeros(kind: str, mask: str) -> None:
    net = Digits()
    made = MADE[kind](net.parameters())
    session = Session(net, {"mask": MASKS[mask]})
    with session.drive(made, digits(1), total_steps=STEPS):
        masks = [session.mask]
        for number, _ in enumerate(loop(net, made), 1):
            assert session.clock.step == number and not outside(session)
            masks.append(session.mask)
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())
    moved = sum(old != new for old, new in itertools.pairwise(masks))
    assert not moved if mask == "random" else moved


@pytest.mark.parametrize("mask", ["random", "rigl"])
def test_sam_by_two_calls_is_one_step(mask: str) -> None:
    net = Digits()
    made, session = Sam(sgd(net.parameters())), Session(net, {"mask": MASKS[mask]})
    with session.drive(made, total_steps=STEPS):
        for number, (x, y) in enumerate(digits(STEPS), 1):
            F.cross_entropy(net(x), y).backward()
            made.first_step()
            assert session.clock.step == number - 1
            F.cross_entropy(net(x), y).backward()
            made.second_step()
            made.base.zero_grad()
            assert session.clock.step == number and not outside(session)


@pytest.mark.parametrize("listed", [False, True])
def test_sam_is_none_for_weights_that_never_train(listed: bool) -> None:
    net = Digits()
    sam = Sam(sgd(net.parameters()))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    session = Session(net, {"mask": {"kind": "edge_popup", "sparsity": 0.5}, "tweaks": []})
    with pytest.raises(
        TostError, match="mask edge_popup: expected one gradient for each step, got Sam, which takes two"
    ):
        session.begin([sam] if listed else sam, digits(1), total_steps=STEPS)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


class SamByClosure(Sam):
    """The same in one call, which takes the second gradient from the closure."""

    def step(self, closure: Any) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("mask", MASKS)
def test_sam_by_a_closure_is_one_step(mask: str) -> None:
    net = Digits()
    made, session = SamByClosure(sgd(net.parameters())), Session(net, {"mask": MASKS[mask]})
    hidden = []
    with session.drive(made, total_steps=STEPS):
        for number, (x, y) in enumerate(digits(STEPS), 1):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                made.base.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            closure()
            made.step(closure)
            assert session.clock.step == number and not outside(session)
            hidden.append(sum(float(b.abs().sum()) for name, b in net.named_buffers() if name.endswith("hidden")))
    assert [value > 0 for value in hidden] == [mask == "dnw"] * STEPS  # what trains out of sight is still there


def test_the_first_of_two_optimizers_may_step_less_often() -> None:
    net = Digits()
    seldom, often = two(net.parameters())
    session = Session(net, {"mask": MASKS["random"]})
    with session.drive([seldom, often], total_steps=STEPS):
        for number, (x, y) in enumerate(digits(4)):
            F.cross_entropy(net(x), y).backward()
            if number % 2:
                seldom.step()
            often.step()
        assert session.clock.step == 3 and not outside(session)  # the fourth waits for nobody
        often.step()
        assert session.clock.step == 4


def test_what_a_wrapper_had_before_comes_back() -> None:
    net = Digits()
    made = Lookahead(sgd(net.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(made.base_optimizer, lambda step: 1.0)
    with pytest.raises(ZeroDivisionError), Session(net, {"mask": MASKS["random"]}).drive(made, total_steps=STEPS):
        assert "step" in vars(made)
        raise ZeroDivisionError
    assert "step" not in vars(made)
    schedule.step()
    net(digits(1)[0][0]).sum().backward()
    made.step()
    assert made.count == 1


def test_no_step_by_the_end_is_an_error() -> None:
    net = Digits()
    session, other = Session(net, {"mask": MASKS["random"]}), sgd(net.parameters())
    with (
        pytest.raises(
            TostError, match=r"drive: expected steps of the optimizer that .* was given, SGD, got none; give it"
        ),
        session.drive(sgd(net.parameters()), total_steps=STEPS),
    ):
        for _ in loop(net, other):
            pass
    assert session.state == "running"  # nothing is lost


def test_one_of_two_optimizers_is_not_enough() -> None:
    net = Digits()
    with pytest.raises(
        TostError, match=r"optimizer: expected one that trains every prunable weight .* give a list where several"
    ):
        Session(net, {"mask": MASKS["random"]}).attach(two(net.parameters())[1])


def test_grown_weights_get_what_the_optimizer_gives_a_new_one() -> None:
    for kind, starts in ((torch.optim.Rprop, {"prev": 0.0, "step_size": 0.02}), (Neutral, {"square": 2.0})):
        net = Digits()
        made: Any = kind(net.parameters(), lr=0.02)
        assert start_values(made, net.body[0].weight) == pytest.approx(starts)
        session = Session(net, {"mask": {**MASKS["rigl"], "every": "3ba"}})
        with session.drive(made, digits(1), total_steps=STEPS):
            steps, old = loop(net, made), session.mask
            for _ in range(4):  # the fourth is the one that moves
                next(steps)
            grown = {name: session.mask[name] & ~old[name] for name in old}
            assert any(bool(mask.any()) for mask in grown.values())
            for name, param in prunable(net).items():
                for key, value in numbers(param, made.state[param]):
                    assert torch.equal(value[grown[name]], torch.full_like(value[grown[name]], starts[key]))


def test_what_cannot_be_told_is_left_alone_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Digits()
    made, session = Rotated(net.parameters()), Session(net, {"mask": MASKS["rigl"]})
    assert start_values(made, net.body[0].weight) == {}
    before: dict[str, Tensor] = {}
    with caplog.at_level("INFO"), session.drive(made, digits(1), total_steps=STEPS):
        for number, _ in enumerate(loop(net, made), 1):
            now = {name: made.state[param]["second"].clone() for name, param in prunable(net).items()}
            if number == 3:  # the mask has moved in place of the third step
                assert all(torch.equal(now[name], before[name]) for name in now)
            before = now
    said = [record.message for record in caplog.records if "cannot be told" in record.message]
    assert len(said) == 1 and said[0].startswith("Rotated: what 'second' holds for a single weight")


class Cautious(torch.optim.SGD):
    """Weights whose step and gradient agree go on, longer by the share of them in the tensor, as cautious optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param)).lerp_(param.grad, 0.1)
                agree = (momentum * param.grad > 0).to(param.dtype)
                param.sub_(group["lr"] * momentum * agree / agree.mean().clamp_min(1e-3))


class AsAll(torch.optim.SGD):
    """Wants every gradient, and gives up if one is missing, as Adai and DAdaptSGD do."""

    def step(self, closure: Any = None) -> None:
        assert all(param.grad is not None for group in self.param_groups for param in group["params"])
        super().step()


class Second(Optimizer):
    """Goes back along the gradients: the diagonal of the Hessian, as AdaHessian estimates it."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        curved = torch.autograd.grad(grads, params, [torch.ones_like(grad) for grad in grads])
        with torch.no_grad():
            for param, grad, bend in zip(params, grads, curved, strict=True):
                kept = self.state[param].setdefault("bend", torch.zeros_like(param)).lerp_(bend.abs(), 0.1)
                param.sub_(self.param_groups[0]["lr"] * grad.detach() / (1 + kept))


class Exchanging(Optimizer):
    """Trains with weights between fast ones and their average, and evaluates with the average, as schedule-free ones do."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})
        self.training, self.count = True, 0

    def train(self) -> None:
        self._go(True, 0.1)

    def eval(self) -> None:
        self._go(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def _go(self, training: bool, share: float) -> None:
        if training != self.training:
            self.training = training
            for param, state in self.state.items():
                param.lerp_(state["fast"], share)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for param in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            fast = self.state[param].setdefault("fast", param.clone())
            average = param.lerp(fast, 1 - 1 / 0.9)
            fast.sub_(self.param_groups[0]["lr"] * param.grad)
            param.copy_(average.lerp(fast, 1 / self.count).lerp(fast, 0.1))


def started(made: Callable[[Any], Any], mask: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines about the optimizer when a session starts."""
    net = Digits()
    with caplog.at_level("INFO"):
        caplog.clear()
        Session(net, {"mask": MASKS[mask]}).attach().start(made(net.parameters()), digits(1), total_steps=STEPS)
    return [record.message for record in caplog.records if not record.message.startswith("recipe")]


@pytest.mark.parametrize(("kind", "way"), [(Cautious, "times as far as they would alone; dividing the learning rate by 2"),
                                           (Orthogonal, "another way"), (Rotated, "another way"),
                                           (torch.optim.Adafactor, "another way")])  # fmt: skip
def test_removed_weights_that_count_are_said_once(kind: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = started(lambda p: kind(p, lr=0.01), "random", caplog)
    assert (
        len(lines) == 1
        and lines[0].startswith(f"{kind.__name__}: removed weights count in its steps")
        and way in lines[0]
    )


@pytest.mark.parametrize(
    "name", ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]
)
def test_optimizers_that_take_each_weight_by_itself_need_no_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert started(getattr(torch.optim, name), "random", caplog) == []
    assert len(started(getattr(torch.optim, name), "rigl", caplog)) == (name == "NAdam")  # throws what grows late


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_warm_up_from_0_hides_nothing(lr: float, caplog: pytest.LogCaptureFixture) -> None:
    def made(params: Any) -> Any:
        optimizer = Cautious(params, lr=0.1)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr)
        return optimizer

    assert len(started(made, "random", caplog)) == 1


@pytest.mark.parametrize("mask", MASKS)
def test_one_that_wants_every_gradient_survives_moves(mask: str) -> None:
    net = Digits()
    made, session = AsAll(net.parameters(), lr=0.05), Session(net, {"mask": MASKS[mask]})
    with session.drive(made, digits(1), total_steps=STEPS):
        for number, _ in enumerate(loop(net, made), 1):
            assert session.clock.step == number and not outside(session)
    net = Digits()  # where a trainer tells of the steps
    made, session = AsAll(net.parameters(), lr=0.05), Session(net, {"mask": MASKS[mask]}).attach()
    session.start(made, digits(1), total_steps=STEPS)
    for x, y in digits(STEPS):
        made.zero_grad()
        F.cross_entropy(net(x), y).backward()
        session.before_step()
        made.step()
        session.after_step()
    assert "step" not in vars(made) and not outside(session)


@pytest.mark.parametrize("mask", MASKS)
def test_second_order_optimizers(mask: str) -> None:
    net = Digits()
    made, session = Second(net.parameters()), Session(net, {"mask": MASKS[mask]})
    wrong = pytest.raises(TostError, match=r"mask dnw: expected gradients alone, got some with a graph")
    with wrong if mask == "dnw" else contextlib.nullcontext(), session.drive(made, total_steps=STEPS):
        for number, (x, y) in enumerate(digits(STEPS), 1):
            made.zero_grad()
            F.cross_entropy(net(x), y).backward(create_graph=True)
            made.step()
            assert session.clock.step == number and not outside(session)
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())


@pytest.mark.parametrize("mask", MASKS)
def test_one_that_exchanges_the_weights_evaluates_the_sparse_network(mask: str) -> None:
    net = Digits()
    made, session = Exchanging(net.parameters()), Session(net, {"mask": MASKS[mask]})
    with session.drive(made, digits(1), total_steps=STEPS):
        for _ in loop(net, made):
            before = {name: value.clone() for name, value in net.state_dict().items()}
            made.eval()
            assert not outside(session)
            made.train()
            for name, value in net.state_dict().items():
                torch.testing.assert_close(value, before[name])
    made.eval()
    assert not outside(session) and "eval" not in vars(made)


def test_lbfgs_begins_again_where_the_mask_moves() -> None:
    net = Digits()
    made, session = torch.optim.LBFGS(net.parameters(), lr=0.05, max_iter=2), Session(net, {"mask": MASKS["rigl"]})
    with session.drive(made, digits(1), total_steps=STEPS):
        for x, y in digits(STEPS):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                made.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            old = session.mask
            made.step(closure)
            assert (session.mask != old) == (not made.state) and not outside(session)


def test_what_is_no_optimizer_is_named() -> None:
    net = Digits()
    for thing, got in (
        (None, "NoneType"),
        (torch.optim.SGD, "the class SGD"),
        ({"body": torch.optim.SGD(net.parameters(), lr=0.1)}, "dict"),
        (digits(1), "tuple"),
    ):
        session = Session(net, {"mask": MASKS["random"], "tweaks": []}).attach()
        with pytest.raises(
            TostError, match=f"optimizer: expected one of torch's kind, or a list of several, got {got}; pass"
        ):
            session.start(thing, total_steps=1)
        session.finish()


@pytest.mark.parametrize("mask", ["random", "rigl", "dnw"])
def test_a_step_within_the_backward_pass_is_refused(mask: str) -> None:
    net = Digits()
    session, each = Session(net, {"mask": MASKS[mask]}), {param: sgd([param]) for param in net.parameters()}
    for param in each:
        param.register_post_accumulate_grad_hook(lambda param: each[param].step())
    said = refused(lambda: drive_once(session, list(each.values())))
    assert "expected SGD.step() behind the backward pass, got one from within it" in said and not session.clock.step


def drive_once(session: Session, optimizers: list[Any]) -> None:
    images, labels = digits(1)[0]
    with session.drive(optimizers, [(images, labels)], total_steps=STEPS):
        F.cross_entropy(session.model(images), labels).backward()
