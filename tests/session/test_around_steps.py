"""Tweaks around the steps of other people's optimizers; in runs that go on, that compute a part, and on two ranks."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from step_watch import SEEN, calls, noting, same
from test_optimizers import Lookahead, Sam, SamByClosure, sgd, two
from torch import Tensor, nn

from tost_plugins import Session
from tost_plugins.errors import Inapplicable
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.neuron_gradients import factors

STEPS = 8
RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}
BOTH = ["neuron_gradients", {"kind": "multiplicative", "warmup": "4ba"}]
WHOLE = [(moment, step) for step in range(STEPS) for moment in ("before", "after")]


def backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    return loss


def grads_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in prunable(net).items()}


# ---- whose steps


@pytest.mark.parametrize("made", [sgd, two, lambda p: Lookahead(sgd(p)), lambda p: Lookahead(Lookahead(sgd(p), 3))])
def test_several_optimizers_and_wrappers_make_one_step(made: Any) -> None:
    net = Digits()
    optimizer, session = made(net.parameters()), Session(net, {"mask": RANDOM, "tweaks": [noting()]})
    given = []
    with session.drive(optimizer, digits(1), total_steps=STEPS):
        for batch in digits(STEPS):
            backward(net, batch)
            given.append(grads_of(net))
            for each in optimizer if isinstance(optimizer, list) else [optimizer]:
                each.step()
            for each in optimizer if isinstance(optimizer, list) else [optimizer]:
                each.zero_grad()
    assert calls() == WHOLE
    for seen, grads in zip(SEEN[::2], given, strict=True):
        assert same(seen["gradients"], grads)


def test_sam_by_two_calls_is_one_step_with_its_second_gradient() -> None:
    net = Digits()
    made, session, given = Sam(sgd(net.parameters())), Session(net, {"mask": RANDOM, "tweaks": [noting()]}), []
    with session.drive(made, digits(1), total_steps=STEPS):
        for batch in digits(STEPS):
            backward(net, batch)
            made.first_step()
            backward(net, batch)
            given.append(grads_of(net))
            made.second_step()
            made.base.zero_grad()
    assert calls() == WHOLE
    assert all(same(seen["gradients"], grads) for seen, grads in zip(SEEN[1::2], given, strict=True))


def test_sam_by_a_closure_is_one_step() -> None:
    net = Digits()
    made, session = SamByClosure(sgd(net.parameters())), Session(net, {"mask": RANDOM, "tweaks": [noting()]})
    with session.drive(made, digits(1), total_steps=STEPS):
        for batch in digits(STEPS):

            def closure(batch: Any = batch) -> Tensor:
                made.base.zero_grad()
                return backward(net, batch)

            closure()
            made.step(closure)
    assert calls() == WHOLE


@pytest.mark.parametrize("to_none", [True, False])
def test_each_gradient_of_a_closure_is_multiplied_once(to_none: bool) -> None:
    """L-BFGS asks several times in a step; the gradient that it is given is each time the loss's times the factor."""
    net, plain = Digits(norm=False).double(), Digits(norm=False).double()
    session = Session(net, {"mask": RANDOM, "tweaks": ["neuron_gradients"]}).attach()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    session.begin(optimizer, digits(1), total_steps=2)
    asked, weights, batch = [], [], tuple(part.double() if part.is_floating_point() else part for part in digits(1)[0])

    gather = optimizer._gather_flat_grad

    def given() -> Tensor:
        asked.append({name: param.grad.clone() for name, param in prunable(net).items()})
        weights.append(copy.deepcopy([param.detach() for param in net.parameters()]))
        return gather()

    optimizer._gather_flat_grad = given

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=to_none)
        return backward(net, batch)

    for _ in range(2):
        optimizer.step(closure)
    assert len(asked) > 4
    for grads, values in zip(asked, weights, strict=True):
        for param, value in zip(plain.parameters(), values, strict=True):
            param.data.copy_(value)
        plain.zero_grad()
        backward(plain, batch)
        for name, param in prunable(plain).items():
            keep = session.mask[name]
            torch.testing.assert_close(grads[name], param.grad * keep * factors(keep).double())
    session.finish()


def test_a_step_that_is_announced_twice_is_one() -> None:
    found = []
    for times in (1, 2, 3):
        net = Digits()
        session, optimizer = Session(net, {"mask": RANDOM, "tweaks": BOTH}).attach(), sgd(net.parameters())
        session.start(optimizer, digits(1), total_steps=STEPS)
        for batch in digits(STEPS):
            optimizer.zero_grad(set_to_none=False)
            backward(net, batch)
            for _ in range(times):
                session.before_step()
            optimizer.step()
            session.after_step()
            session.after_step(session.clock.step)
        session.finish()
        found.append(dict(net.state_dict()))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_what_comes_by_without_an_announcement_is_left_alone() -> None:
    net = Digits()
    session, optimizer = Session(net, {"mask": RANDOM, "tweaks": [noting()]}).attach(), sgd(net.parameters())
    session.start(optimizer, digits(1), total_steps=STEPS)
    backward(net, digits(1)[0])
    optimizer.step()
    session.after_step()
    session.finish()
    session.before_step()
    session.after_step()
    assert calls() == []


# ---- runs that go on, and parts of networks


@pytest.mark.parametrize("case", ["random", *(case for case in MOVING if case != "edge_popup")])  # which refuses them
def test_a_run_that_goes_on_is_the_whole_one_bit_for_bit(case: str) -> None:
    recipe = {"mask": MOVING.get(case, RANDOM), "tweaks": BOTH}

    def run(model: dict[str, Tensor] | None = None, state: Any = None, first: int = 0, last: int = STEPS) -> Any:
        net = Digits()
        session, optimizer = Session(net, recipe).attach(), sgd(net.parameters())
        if model is not None:
            net.load_state_dict(model)
            optimizer.load_state_dict(state)
        session.begin(optimizer, digits(1), total_steps=STEPS)
        for batch in digits(STEPS)[first:last]:
            optimizer.zero_grad()
            backward(net, batch)
            optimizer.step()
        metrics = session.metrics()
        saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        if last == STEPS:
            session.finish()
        return saved, metrics

    (whole, _), metrics = run()
    (half, state), _ = run(last=3)
    (resumed, _), again = run(half, state, first=3)
    assert same(whole, resumed) and metrics == again
    assert {f"tost/{name}" for name in ("neuron_gradients/least", "multiplicative/exponent")} <= metrics.keys()


def test_a_compact_run_is_the_one_that_computes_all() -> None:
    found = []
    for compact in (False, True):
        net = Digits().double()
        mask = {"kind": "synflow", "sparsity": 0.9}
        session = Session(net, {"mask": mask, "tweaks": BOTH, "compact": compact})
        optimizer = sgd(net.parameters())
        with session.drive(optimizer, [(x.double(), y) for x, y in digits(1)], total_steps=STEPS):
            for x, y in digits(STEPS):
                optimizer.zero_grad()
                backward(net, (x.double(), y))
                optimizer.step()
        found.append(dict(net.state_dict()))
        assert session.left_out == []
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# ---- ranks


def test_two_ranks_train_alike_with_whole_weights_parts_and_a_shared_optimizer(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(here / "ranks/around_steps.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case, found in ranks[0].items():
        assert same(found, ranks[1][case]), case
    plain = ranks[0].pop("ddp")
    assert set(ranks[0]) == {"without", "fsdp2", "zero", "rigl", "rigl fsdp2"}
    rigl = ranks[0].pop("rigl")
    assert not same(plain, ranks[0].pop("without"))
    for case, found in ranks[0].items():
        wanted = rigl if case.startswith("rigl") else plain
        assert found.keys() == wanted.keys(), case
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}"
            )


# ---- masked weights that take no steps


@pytest.mark.parametrize("kind", ["neuron_gradients", "multiplicative", "sharpness"])
@pytest.mark.parametrize(
    "recipe, why",
    [
        ({"mask": {"kind": "edge_popup", "sparsity": 0.5}}, "mask edge_popup, under which they never do"),
        ({"mask": {"kind": "random", "sparsity": 0.5}, "train": "norms"}, "train: norms"),
    ],
)
def test_where_masked_weights_take_no_steps_there_is_nothing_to_act_on(
    kind: str, recipe: dict[str, Any], why: str
) -> None:
    net = Digits()
    names = list(net.state_dict())
    with pytest.raises(Inapplicable, match=f"^{kind}: expected masked weights that train, got {why}; leave {kind} out"):
        Session(net, {**recipe, "tweaks": [kind]}).attach()
    assert list(net.state_dict()) == names
    session = Session(net, {**recipe, "tweaks": [{"kind": kind, "optional": True}]}).attach()
    assert session.left_out == [f"{kind} (expected masked weights that train, got {why})"] and not list(session.tweaks)
