"""`begin` ahead of a loop and `finish` behind it, for loops that nobody wants to indent: the same run as in `drive`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tost_plugins import Session, TostError
from tost_plugins.training.clock import Clock

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
    assert session.clock.step == session.saved_step() == 1
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


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["kind"])
def test_an_optimizer_that_is_made_anew_in_the_loop_is_said(
    mask: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    net = small()
    session = Session(net, recipe(mask))
    with session.drive(optimizer := sgd(net), BATCHES, total_steps=STEPS):
        for number, batch in enumerate(BATCHES):
            optimizer = sgd(net) if number == 3 else optimizer
            step(net, optimizer, batch)
    assert sum("got none since step 3, where weights trained on" in line for line in caplog.messages) == 1


def test_gradients_that_no_step_followed_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    net = small()
    with Session(net, recipe(MASKS[0])).drive(optimizer := sgd(net), BATCHES, total_steps=2):
        for number, (x, y) in enumerate(BATCHES):
            F.cross_entropy(net(x), y).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            for param in net.parameters():  # an average's, say
                param.mul_(0.5)
    assert not any("trained on" in line for line in caplog.messages)


def test_a_loop_that_begins_again_has_its_own_length() -> None:
    ghosts = {"mask": MASKS[0] | {"on_collapse": "keep_one"}, "tweaks": [{"kind": "ghost_skip", "until": "0.5dur"}]}
    alphas = []
    for first in (100, STEPS):
        net = small()
        session, optimizer = Session(net, ghosts), sgd(net)
        session.begin(optimizer, BATCHES, total_steps=first)
        step(net, optimizer, BATCHES[0])
        session.begin(optimizer, BATCHES, total_steps=STEPS)
        step(net, optimizer, BATCHES[1])
        assert session.clock == Clock(2, STEPS, STEPS)
        assert net.state_dict()["tost_clock"].tolist() == [2, STEPS, STEPS]
        alphas.append(session.metrics()["tost/ghost_skip/alpha"])
    assert alphas == [0.5, 0.5]


def test_a_checkpoints_length_stands_above_one_given_later(caplog: pytest.LogCaptureFixture) -> None:
    net = small()
    session, optimizer = Session(net, recipe(MASKS[0])), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=100)
    step(net, optimizer, BATCHES[0])
    other = small()
    late, own = Session(other, recipe(MASKS[0])).attach(), sgd(other)
    other.load_state_dict(net.state_dict())
    late.begin(own, BATCHES, total_steps=100)
    late.begin(own, BATCHES, total_steps=100)
    assert "not used" not in caplog.text
    late.begin(own, BATCHES, total_steps=50)
    assert late.clock == Clock(1, 100, STEPS) and "not used: total_steps 50" in caplog.text


def test_what_rested_acts_when_the_loop_begins_again_longer(caplog: pytest.LogCaptureFixture) -> None:
    tweaks = [
        {"kind": "ghost_skip", "until": "4ba", "least_steps": 8},
        {"kind": "rescaled_init", "iterations": 3, "learning_rate": 0.1, "least_steps": 8},
    ]
    made = {}
    for lengths in ((STEPS,), (4, STEPS)):
        net = small()
        session, optimizer = Session(net, {"mask": {"kind": "magnitude", "sparsity": 0.5}, "tweaks": tweaks}), sgd(net)
        for length in lengths:
            session.begin(optimizer, BATCHES, total_steps=length)
        assert not session.left_out and session.metrics()["tost/ghost_skip/alpha"] == 1
        made[lengths] = net.state_dict()
    whole, again = made.values()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_what_is_at_work_stays_so_in_a_shorter_loop() -> None:
    net = small()
    tweak = {"kind": "ghost_skip", "until": "0.5dur", "least_steps": 8}
    session, optimizer = Session(net, {"mask": MASKS[0] | {"on_collapse": "keep_one"}, "tweaks": [tweak]}), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=STEPS)
    session.begin(optimizer, BATCHES, total_steps=4)
    step(net, optimizer, BATCHES[0])
    assert session.metrics()["tost/ghost_skip/alpha"] == 0.5
    step(net, optimizer, BATCHES[1])
    assert session.is_plain and session.finish().sparsity == pytest.approx(0.6, abs=0.01)


def test_a_tweak_that_cannot_begin_late_is_asked_again() -> None:
    net = small()
    tweak = {"kind": "rescaled_init", "iterations": 3, "least_steps": 8}
    session, optimizer = Session(net, {"mask": {"kind": "magnitude", "sparsity": 0.5}, "tweaks": [tweak]}), sgd(net)
    session.begin(optimizer, BATCHES, total_steps=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(2):
        with pytest.raises(TostError, match="rescaled_init: expected batches to look at"):
            session.begin(optimizer, total_steps=STEPS)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items() if "tost" not in name)
    session.begin(optimizer, BATCHES, total_steps=STEPS)
    assert not torch.equal(before["0.weight"], net.state_dict()["0.weight"])


def test_a_state_dict_from_before_the_start_brings_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    """One that was taken when the session had been attached, before a mask was found: its weights alone are taken."""
    for mask in MASKS[:2]:
        net = small()
        session, optimizer = Session(net, recipe(mask)).attach(), sgd(net)
        first = {name: value.clone() for name, value in net.state_dict().items()}
        session.begin(optimizer, BATCHES, total_steps=STEPS)
        for batch in BATCHES[:3]:
            step(net, optimizer, batch)
        if mask["kind"] == "rigl":
            with pytest.raises(
                TostError, match="expected one from after the start, got one from before it, when mask rigl"
            ):
                net.load_state_dict(first)
            continue
        found, clock = session.mask, session.clock
        net.load_state_dict(first)
        assert session.mask == found and session.clock == clock and found.sparsity == pytest.approx(0.6, abs=0.01)
        assert torch.equal(net.state_dict()["0.weight"], first["0.weight"] * found["0.weight"])
        assert net.state_dict()["tost_clock"].tolist() == [3, STEPS, STEPS] and "mask and step 3 stay" in caplog.text
        step(net, optimizer, BATCHES[3])
        session.finish()
        assert session.mask == found and not net.state_dict()["0.weight"][~found["0.weight"]].any()


@pytest.mark.parametrize("given", [-5, 2.5, "10", True, float("nan")])
@pytest.mark.parametrize("name", ["total_steps", "steps_per_epoch"])
def test_lengths_that_are_no_numbers_of_steps_are_refused(name: str, given: Any) -> None:
    net = small()
    session = Session(net, recipe(MASKS[0]))
    with pytest.raises(TostError, match=f"^{name}: expected a whole number of optimizer steps, got {given!r}; write"):
        session.begin(sgd(net), BATCHES, **{"total_steps": 4, name: given})
    session.begin(sgd(net), BATCHES, **{"total_steps": 4, name: torch.tensor(8)})
    assert getattr(session.clock, name) == 8 and isinstance(getattr(session.clock, name), int)
