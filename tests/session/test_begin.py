"""`begin` ahead of a loop and `finish` behind it, for loops that nobody wants to indent: the same run as in `drive`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tost_plugins import Session, TostError

STEPS = 8
MASKS = [
    {"kind": "snip", "sparsity": 0.6},
    {"kind": "rigl", "sparsity": 0.6, "every": "2ba"},
    {"kind": "dnw", "sparsity": 0.6},
]
GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [
    (torch.randn(6, 1, 6, 6, generator=GENERATOR), torch.randint(2, (6,), generator=GENERATOR)) for _ in range(STEPS)
]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def sgd(net: nn.Module) -> Any:
    return SGD(net.parameters(), lr=0.1, momentum=0.9)


def two(net: nn.Module) -> Any:
    params = list(net.parameters())
    return [SGD(params[:4], lr=0.1), AdamW(params[4:], lr=1e-3)]


def step(net: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for each in optimizers:
        each.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    for each in optimizers:
        each.step()


def recipe(mask: dict[str, Any]) -> dict[str, Any]:
    return {"mask": {**mask, "on_collapse": "keep_one"}, "tweaks": [{"kind": "ghost_skip", "until": "4ba"}]}


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["kind"])
@pytest.mark.parametrize("made", [sgd, two])
def test_the_same_run_as_in_drive(mask: dict[str, Any], made: Callable[[nn.Module], Any]) -> None:
    net = small()
    session, optimizer = Session(net, recipe(mask)), made(net)
    with session.drive(optimizer, BATCHES, total_steps=STEPS):
        for batch in BATCHES:
            step(net, optimizer, batch)
    other = small()
    begun, optimizer = Session(other, recipe(mask)), made(other)
    assert begun.begin(optimizer, BATCHES, total_steps=STEPS) is begun
    for count, batch in enumerate(BATCHES):
        assert begun.clock.step == count
        step(other, optimizer, batch)
    report = begun.finish()
    assert (begun.clock.step, begun.clock.steps_per_epoch) == (STEPS, STEPS)
    assert str(report) == str(session.report())
    assert list(net.state_dict()) == list(other.state_dict()) == list(small().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_finish_takes_the_hooks_away() -> None:
    net = small()
    session, optimizer = Session(net, recipe(MASKS[0])), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=STEPS)
    step(net, optimizer, BATCHES[0])
    session.finish()
    with pytest.raises(TostError, match="finish: expected a session that is"):
        session.finish()
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert session.clock.step == 1
    assert all(bool((net.get_parameter(name)[~kept] != 0).all()) for name, kept in session.mask.items())


def test_a_loop_that_an_error_left_begins_again() -> None:
    net = small()
    session, optimizer = Session(net, recipe(MASKS[0])), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=STEPS)
    step(net, optimizer, BATCHES[0])
    session.begin(optimizer, BATCHES, total_steps=STEPS)  # the cell of a notebook, run once more
    step(net, optimizer, BATCHES[1])
    assert session.clock.step == 2
    session.finish()


def test_a_finished_network_is_trained_on_sparse() -> None:
    net = small()
    session, optimizer = Session(net, recipe(MASKS[0])), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=STEPS)
    step(net, optimizer, BATCHES[0])
    sparsity = session.finish().sparsity
    session.begin(optimizer, BATCHES)
    step(net, optimizer, BATCHES[1])
    assert session.finish().sparsity == sparsity
    assert all(not bool(net.get_parameter(name)[~kept].any()) for name, kept in session.mask.items())


def test_another_optimizer_that_steps_is_an_error_when_the_loop_ends() -> None:
    net = small()
    session = Session(net, recipe(MASKS[0]))
    session.begin(sgd(net), BATCHES, total_steps=STEPS)
    step(net, sgd(net), BATCHES[0])
    with pytest.raises(TostError, match=r"expected steps of the optimizer that .* was given, SGD, got none"):
        session.finish()
