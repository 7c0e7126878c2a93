"""Gradients of removed weights are 0 as they come: what a loop clips, logs or averages is the sparse network's gradient."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import AFTER, MOVING, STEPS, Digits, digits
from torch import Tensor, nn

from tost_plugins import Session
from tost_plugins.training.params import prunable

RANDOM = {"mask": {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}}
CLIP = 0.1


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def backward(net: Any, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(net(batch[0]), batch[1]).backward()


def dense(session: Session) -> list[str]:
    """Names of the weights whose gradients reach what the mask has removed."""
    return [
        name
        for name, param in prunable(session.model).items()
        if param.grad is not None and bool(param.grad[~session.mask[name]].any())
    ]


def hooked(net: nn.Module) -> list[str]:
    return [name for name, param in net.named_parameters() if param._post_accumulate_grad_hooks]


def test_a_clipped_run_is_that_of_gradients_masked_by_hand() -> None:
    net, plain = Digits(), Digits()
    session, optimizer, by_hand = Session(net, RANDOM), sgd(net), sgd(plain)
    with session.drive(optimizer, total_steps=STEPS):
        mask = dict(session.mask)
        for name, param in prunable(plain).items():
            param.data[~mask[name]] = 0
        for batch in digits(STEPS):
            norms = []
            for which, step in ((net, optimizer), (plain, by_hand)):
                step.zero_grad()
                backward(which, batch)
                if which is plain:
                    unmasked = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
                    for name, param in prunable(plain).items():
                        param.grad[~mask[name]] = 0
                norms.append(torch.nn.utils.clip_grad_norm_(which.parameters(), CLIP))
                step.step()
            assert torch.equal(*norms) and CLIP < norms[0] < 0.95 * unmasked
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: torch.compile(net, backend="aot_eager")],
                         ids=["eager", "compiled"])  # fmt: skip
def test_no_backward_pass_leaves_a_gradient_outside_a_static_mask(wrap: Callable[[nn.Module], Any]) -> None:
    net = Digits()
    session, optimizer = Session(net, RANDOM).attach(), sgd(net)
    model = wrap(net)
    with session.drive(optimizer, total_steps=STEPS):
        for first, second in zip(digits(6)[::2], digits(6)[1::2], strict=True):
            optimizer.zero_grad()
            for batch in (first, second):  # micro-batches
                backward(model, batch)
                assert not dense(session) and all(param.grad is not None for param in net.parameters())
            optimizer.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["rigl", "set", "dnw", "dnw_frozen", "top_kast", *AFTER])
def test_a_mask_that_moves_sees_the_gradients_it_needs_and_clipping_sees_the_rest(case: str) -> None:
    """RigL compares the removed weights' gradients on the steps that are due, DNW trains them until it is frozen."""
    net, found = Digits(), []
    session, optimizer = Session(net, {"mask": MOVING[case]}), sgd(net)
    with session.drive(optimizer, total_steps=STEPS):
        for step, batch in enumerate(digits(STEPS)):
            optimizer.zero_grad()
            for part in range(2):  # of all micro-batches
                backward(net, tuple(tensor.chunk(2)[part] for tensor in batch))
            if dense(session):
                found.append(step)
            optimizer.step()
    expected = {"rigl": [2, 4, 6], "set": [2, 4, 6], "dnw": [*range(10)], "dnw_frozen": [*range(5)]}
    expected["top_kast"] = expected["dnw"]  # of those that train
    assert found == expected.get(case, [])


def test_a_frozen_weight_is_masked_when_it_is_trained_again() -> None:
    net = Digits()
    session, optimizer = Session(net, RANDOM).attach(), sgd(net)
    net.body[0].weight.requires_grad_(False)
    with session.drive(optimizer, total_steps=STEPS):
        assert not net.body[0].weight.requires_grad
        backward(net, digits(1)[0])
        assert net.body[0].weight.grad is None
        net.body[0].weight.requires_grad_()
        backward(net, digits(1)[0])
        assert net.body[0].weight.grad.any() and not dense(session)
        optimizer.step()


def test_parameters_that_loading_puts_in_place_are_masked_too() -> None:
    net = Digits()
    session = Session(net, RANDOM).attach()
    session.start(sgd(net), total_steps=STEPS)
    saved, old = copy.deepcopy(net.state_dict()), dict(net.named_parameters())
    net.load_state_dict(saved, assign=True)
    session.start(sgd(net), total_steps=STEPS)
    assert all(param is not old[name] for name, param in net.named_parameters())
    backward(net, digits(1)[0])
    assert not dense(session) and not any(param._post_accumulate_grad_hooks for param in old.values())
    session.finish()


def test_when_a_loop_is_over_gradients_are_those_of_any_network() -> None:
    net = Digits()
    session = Session(net, RANDOM).attach()
    assert not hooked(net)
    with pytest.raises(KeyboardInterrupt), session.drive(sgd(net), total_steps=STEPS):
        assert hooked(net) == list(prunable(net))
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert not hooked(twin)
        raise KeyboardInterrupt
    assert not hooked(net)
    for _ in range(2):  # the run itself, and one that trains the finished network on with its mask
        optimizer = sgd(net)
        with session.drive(optimizer, total_steps=STEPS):
            backward(net, digits(1)[0])
            assert not dense(session)
            optimizer.step()
        assert session.state == "finished" and not hooked(net)
        net.zero_grad()
    backward(net, digits(1)[0])
    assert dense(session)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_gradients_are_masked_alike() -> None:
    """Second-order optimizers (AdaHessian) keep the gradient's graph."""
    net = Digits()
    session = Session(net, RANDOM).attach()
    session.start(sgd(net), total_steps=STEPS)
    x, y = digits(1)[0]
    F.cross_entropy(net(x), y).backward(create_graph=True)
    weight, keep = net.body[0].weight, session.mask["body.0.weight"]
    assert not weight.grad[~keep].any()
    (second,) = torch.autograd.grad((weight.grad * ~keep).sum(), [weight])
    assert not second.any()  # nothing that the mask has taken out is differentiated
    session.finish()
    net.zero_grad()


def test_gradients_that_others_have_put_there_or_changed_are_masked_before_the_step() -> None:
    net, seen = Digits(), []
    session = Session(net, RANDOM)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with session.drive(optimizer, total_steps=STEPS):
        optimizer.register_step_pre_hook(lambda *_: seen.append(dense(session)))  # behind the session's
        for change in (
            lambda param: setattr(param, "grad", torch.ones_like(param)),
            lambda param: param.grad.add_(1.0),
            lambda param: param.grad.mul_(2.0),
        ):
            backward(net, digits(1)[0])
            change(net.body[3].weight)
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [[]] * 3


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_large_gradients_are_finite(size: float) -> None:
    net = Digits()
    session, optimizer = Session(net, RANDOM), torch.optim.SGD(net.parameters(), lr=1e-30)
    with session.drive(optimizer, total_steps=STEPS):
        backward(net, digits(1)[0])
        net.body[3].weight.grad.fill_(size)
        optimizer.step()
        assert session.clock.step == 1


# ---- ranks


def test_under_ddps_hooks_what_is_clipped_is_the_sparse_gradient(tmp_path: Path) -> None:
    """PowerSGD and the like make gradients anew once all have come; a static graph changes nothing."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(root / "tests/ranks/hooks_ddp.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for case, found in first.items():
        assert set(found["outside"]) == {0} and len(found["outside"]) > 4, case
        assert all(found["sparse"]) and found["norms"] == second[case]["norms"], case
        assert all(torch.equal(value, second[case]["weights"][name]) for name, value in found["weights"].items()), case
    assert first["powersgd"]["norms"] != first["plain"]["norms"]  # it is at work
    assert first["static graph"]["norms"] == first["plain"]["norms"]
