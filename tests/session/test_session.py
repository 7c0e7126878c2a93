"""The life of a session: order, masks, ghosts, counts, checkpoints and errors, in loops as users write them."""

import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from zoo import OWN, Pool, build, data, inputs, logits

from tost_plugins import Mask, Session, TostError
from tost_plugins.session.drive import follow
from tost_plugins.training.params import prunable

TWEAKS = [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "7ba"}]
TOTAL = 10

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": functools.partial(torch.optim.Adam, lr=1e-3, amsgrad=True, weight_decay=1e-3),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-3),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
}


def recipe(**changes: Any) -> dict[str, Any]:
    return {"mask": {"kind": "random", "sparsity": 0.6}, "tweaks": TWEAKS, **changes}


def small() -> nn.Sequential:
    """210 parameters; 188 of them in Conv and Linear weights; its one ghost would have 24."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        Pool(), nn.Linear(4, 2),
    )  # fmt: skip


def few(count: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches for `small`."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 1, 6, 6, generator=generator), torch.randint(2, (size,), generator=generator))
        for _ in range(count)
    ]


def step(net: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], loss_fn: Any = F.cross_entropy) -> None:
    optimizer.zero_grad()
    loss_fn(logits(net, batch[0]), batch[1]).backward()
    optimizer.step()


def ghosts_in(net: nn.Module) -> dict[int, str]:
    return {id(param): name for name, param in net.named_parameters() if "ghost_skip" in name}


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def outside(session: Session, optimizer: Optimizer | None = None) -> list[Tensor]:
    """All that must be 0: the weights, and optimizer state in their shape, where the mask has removed them."""
    found = []
    for name, param in prunable(session.model).items():
        gone = ~session.mask[name]
        found.append(param.detach()[gone])
        state = optimizer.state.get(param, {}) if optimizer is not None else {}
        found += [value[gone] for value in state.values() if isinstance(value, Tensor) and value.shape == param.shape]
    return found


@contextlib.contextmanager
def unchanged(session: Session) -> Iterator[None]:
    """An error must come, and leave the weights and the session's state as they were."""
    before, state = weights_of(session.model), session.state
    yield
    assert equal(weights_of(session.model), before)
    assert session.state == state


# ---- the order of calls


def test_calls_out_of_order_say_what_the_order_is() -> None:
    net = small()
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    order = "the order is attach, start, before_step / after_step, finish"

    def refused(call: Callable[[], Any], name: str, state: str) -> None:
        with pytest.raises(
            TostError, match=f"^{name}: expected a session that is .*, got one that is {state}; {order}"
        ):
            call()

    for name in ("before_step", "after_step", "finish"):
        refused(getattr(session, name), name, "new")
    refused(lambda: session.start(optimizer, total_steps=2), "start", "new")
    with pytest.raises(
        TostError, match=r"^session.mask: expected a started session, got state 'new'; call start\(\) first"
    ):
        _ = session.mask
    assert session.attach() is session and session.state == "attached"
    refused(session.attach, "attach", "attached")
    for name in ("before_step", "after_step"):
        refused(getattr(session, name), name, "attached")
    with pytest.raises(TostError, match="got state 'attached'"):
        session.metrics()
    session.start(optimizer, total_steps=2)
    assert session.state == "running"
    refused(session.attach, "attach", "running")
    session.finish()
    assert session.state == "finished"
    refused(session.finish, "finish", "finished")
    refused(session.attach, "attach", "finished")


def test_a_model_has_one_session_at_a_time() -> None:
    net = small()
    session = Session(net, recipe()).attach()
    before = weights_of(net)
    with pytest.raises(TostError, match="attach: expected a model without a session, got one that is attached already"):
        Session(net, recipe()).attach()
    assert equal(weights_of(net), before)
    session.finish()
    Session(net, recipe()).attach().finish()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_attach_comes_before_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = small()
    wrapped, before = wrap(net), weights_of(net)
    name = type(wrapped).__name__
    with pytest.raises(
        TostError, match=f"attach: expected the bare model, got it inside {name}; attach first, then wrap"
    ):
        Session(wrapped, recipe()).attach()
    assert equal(weights_of(net), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("at", ["attach", "start"])
def test_an_optimizer_that_lacks_weights_is_named(at: str) -> None:
    net, other = small(), small()
    plain = list(net.state_dict())
    session = Session(net, recipe())
    for params, missing in (
        (net[7].parameters(), "0.weight, 3.weight"),
        (other.parameters(), "0.weight, 3.weight, 7.weight"),
    ):
        optimizer = torch.optim.SGD(params, lr=0.1)
        message = (
            f"optimizer: expected one that trains every prunable weight of the model, got one without {missing}; make"
        )
        if at == "attach":
            with pytest.raises(TostError, match=message):
                session.attach(optimizer)
            assert session.state == "new" and list(net.state_dict()) == plain
            assert len(optimizer.param_groups[0]["params"]) in (2, 9)  # no ghost has joined
        else:
            if session.state == "new":
                session.attach()
            with unchanged(session), pytest.raises(TostError, match=message):
                session.start(optimizer, total_steps=2)
    good = torch.optim.SGD(net.parameters(), lr=0.1)
    if session.state == "new":
        session.attach(good)
    session.start(good, total_steps=2)
    session.finish()


def test_weights_that_are_ignored_need_no_optimizer() -> None:
    net = small()
    session = Session(
        net, recipe(mask={"kind": "random", "sparsity": 0.5, "ignore": ["0", "3.weight"]}, tweaks=[])
    ).attach()
    session.start(torch.optim.SGD(net[7].parameters(), lr=0.1), total_steps=2)
    assert list(session.mask) == ["7.weight"]


def test_an_error_while_attaching_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), Pool(), nn.Linear(4, 2))
    before, types = weights_of(net), [type(module) for module in net.modules()]
    session = Session(net, recipe())  # ghosts have their place here, soft activations have none
    with pytest.raises(TostError, match=r"soft_activation: expected nn\.ReLU"):
        session.attach()
    assert equal(weights_of(net), before) and [type(module) for module in net.modules()] == types
    assert session.state == "new" and not vars(net).get("_ddp_params_and_buffers_to_ignore")


# ---- ghosts and the optimizer


@pytest.mark.parametrize("when", ["before", "given to attach", "after"])
def test_ghosts_join_the_group_of_their_convolution(when: str) -> None:
    net = build("functional")
    block = list(net.block2.parameters())
    rest = [param for param in net.parameters() if all(param is not other for other in block)]

    def groups() -> Optimizer:
        groups = [{"params": list(block), "lr": 0.5}, {"params": list(rest)}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    session = Session(net, recipe())
    optimizer = groups() if when != "after" else None
    session.attach(optimizer if when == "given to attach" else None)
    if optimizer is None:
        block += [param for name, param in net.named_parameters() if "ghost" in name and name.startswith("block2")]
        rest += [param for name, param in net.named_parameters() if "ghost" in name and not name.startswith("block2")]
        optimizer = groups()
    session.start(optimizer, total_steps=TOTAL)
    names = {id(param): name for name, param in net.named_parameters()}
    held = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
    assert sorted(held[0] + held[1]) == sorted(names.values())  # each once
    assert [n for n in held[0] if not n.startswith("block2")] == [n for n in held[1] if n.startswith("block2")] == []
    ghosts = ghosts_in(net)
    assert len(ghosts) == 18
    before = weights_of(net)
    step(net, optimizer, data("functional")[0])
    assert all(not torch.equal(before[name], net.state_dict()[name]) for name in ghosts.values())
    session.finish()
    kept = [param for group in optimizer.param_groups for param in group["params"]]
    assert {id(param) for param in kept} == {id(param) for param in net.parameters()}
    assert {id(param) for param in optimizer.state} <= {id(param) for param in net.parameters()}
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_a_wrapped_optimizer_is_seen_through() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad()

    net = small()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    session = Session(net, recipe())
    with session.drive(Wrapper(Wrapper(inner)), total_steps=TOTAL):
        assert session.optimizers.inner == [inner]
        step(net, Wrapper(inner), few()[0])
        assert session.clock.step == 1
        assert not any(bool(values.any()) for values in outside(session, inner))


# ---- masks are kept


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["functional", "depthwise"])
def test_weights_and_optimizer_state_stay_zero_outside_the_mask(optimizer: str, name: str) -> None:
    net, batches = build(name).train(), data(name)
    session = Session(net, recipe())
    made = OPTIMIZERS[optimizer](net.parameters())
    with session.drive(made, batches, total_steps=TOTAL):
        mask = session.mask
        assert mask.sparsity == pytest.approx(0.6, abs=0.01)
        zeros = outside(session)
        assert sum(values.numel() for values in zeros) == mask.size - mask.kept
        for i in range(TOTAL):
            assert not any(bool(values.any()) for values in outside(session, made))
            before = weights_of(net)
            step(net, made, batches[i % 3])
            assert any(not torch.equal(before[n], t) for n, t in weights_of(net).items() if n in mask)
            found = outside(session, made)
            assert len(found) > 2 * len(mask) - 1  # the state is looked at, too
            assert not any(bool(values.any()) for values in found), i
            assert session.mask == mask and session.clock.step == i + 1
            gone = [p.grad[~mask[n]] for n, p in prunable(net).items()]
            assert not any(bool(values.any()) for values in gone)
    assert session.mask == mask == Mask.from_zeros(prunable(net))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizer_remembers_of_a_dense_network_is_forgotten(optimizer: str) -> None:
    net, batches = small().train(), few()
    made = OPTIMIZERS[optimizer](net.parameters())
    for batch in batches:
        step(net, made, batch)
    session = Session(net, recipe(mask={"kind": "magnitude", "sparsity": 0.5}))
    with session.drive(made, batches, total_steps=2):
        assert not any(bool(values.any()) for values in outside(session, made))
        for param in prunable(net).values():
            param.data += 1  # as code that knows of no mask may do
        step(net, made, batches[0])
        assert len(outside(session, made)) > len(session.mask)
        assert not any(bool(param[~session.mask[name]].any()) for name, param in prunable(net).items())


def test_the_order_of_the_calls_is_that_of_drive() -> None:
    """Without drive: what adapters call around a step."""
    net, batches = small(), few()
    driven = copy.deepcopy(net)
    session = Session(net, recipe()).attach()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    session.start(optimizer, batches, total_steps=TOTAL)
    for i in range(TOTAL):
        optimizer.zero_grad()
        F.cross_entropy(net(batches[i % 2][0]), batches[i % 2][1]).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    session.finish()
    other = Session(driven, recipe()).attach()
    again = OPTIMIZERS["sgd"](driven.parameters())
    with other.drive(again, batches, total_steps=TOTAL):
        for i in range(TOTAL):
            step(driven, again, batches[i % 2])
    assert equal(weights_of(net), weights_of(driven))


def test_a_trainer_may_say_which_step_it_is() -> None:
    net = small()
    session = Session(net, recipe()).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session.start(optimizer, total_steps=TOTAL)
    session.after_step(step=2)
    assert session.clock.step == 2 and session.metrics()["tost/ghost_skip/alpha"] == 0.5


def test_masked_training_is_training_of_the_masked_network() -> None:
    """Without tweaks, a step is that of a plain loop with gradients and weights masked by hand."""
    net, batches = build("functional").train(), data("functional")
    plain = copy.deepcopy(net)
    session = Session(net, recipe(tweaks=[]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with session.drive(optimizer, batches, total_steps=4):
        masks = dict(session.mask)
        for name, param in prunable(plain).items():
            param.data[~masks[name]] = 0
        for i in range(4):
            step(net, optimizer, batches[i % 3])
            by_hand.zero_grad()
            F.cross_entropy(plain(batches[i % 3][0]), batches[i % 3][1]).backward()
            for name, param in prunable(plain).items():
                param.grad[~masks[name]] = 0
            by_hand.step()
    assert equal(weights_of(net), weights_of(plain))


def test_a_step_with_a_closure() -> None:
    net, (batch, *_) = small().train(), few()
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        return loss

    with session.drive(optimizer, total_steps=TOTAL):
        for i, call in enumerate([lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)] * 2):
            before = weights_of(net)
            assert call().ndim == 0
            assert session.clock.step == i + 1
            assert not equal(weights_of(net), before)
            assert not any(bool(values.any()) for values in outside(session, optimizer))
        closure()
        optimizer.step(None)  # gradients are there: they are masked as without a closure
        assert not any(bool(p.grad[~session.mask[n]].any()) for n, p in prunable(net).items())


def test_accumulated_gradients_count_optimizer_steps() -> None:
    net, batches = small().train(), few(4)
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(optimizer, batches, total_steps=TOTAL):
        for i in range(3):
            optimizer.zero_grad()
            for x, y in batches:
                (F.cross_entropy(net(x), y) / 4).backward()
            assert session.clock.step == i
            optimizer.step()
        assert session.clock.step == 3
        assert session.metrics()["tost/ghost_skip/alpha"] == 0.25


def test_gradients_that_are_not_finite_stop_the_run_before_any_weight_changes() -> None:
    net = small().train()
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batch = few()[0]
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(TostError, match=r"step [12]: expected finite gradients, got NaN or Inf in 3.weight; lower"):
            if session.state == "new":
                session.attach().start(optimizer, total_steps=TOTAL)

            remove = follow(session)
            step(net, optimizer, batch)
            optimizer.zero_grad()
            net(batch[0]).sum().backward()
            net[3].weight.grad[0, 0, 0, 0] = bad
            before = weights_of(net)
            try:
                optimizer.step()
            finally:
                remove()
                assert equal(weights_of(net), before)
                session.after_step(1)


def test_an_error_in_the_loop_leaves_the_session_running() -> None:
    net = small().train()
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    for kind in (KeyboardInterrupt, ValueError):
        with pytest.raises(kind), session.drive(optimizer, total_steps=TOTAL):
            step(net, optimizer, few()[0])
            raise kind
        assert session.state == "running" and "tost_clock" in net.state_dict()
    assert session.clock.step == 2  # entered twice, on from where it was
    before = weights_of(net)
    step(net, optimizer, few()[0])
    assert session.clock.step == 2 and not equal(weights_of(net), before)  # the hooks are gone
    with session.drive(optimizer, total_steps=TOTAL):
        assert not any(bool(values.any()) for values in outside(session, optimizer))
    assert session.state == "finished" and "tost_clock" not in net.state_dict()


def test_a_loss_scaler_may_skip_steps() -> None:
    net, batches = small().train(), few()
    session = Session(net, recipe())
    for fused in (False, True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        session = Session(net, recipe())
        with session.drive(optimizer, total_steps=TOTAL):
            for factor in (float("inf"), 1.0, 1.0):
                optimizer.zero_grad()
                scaler.scale(factor * F.cross_entropy(net(batches[0][0]), batches[0][1])).backward()
                before = weights_of(net)
                scaler.step(optimizer)
                scaler.update()
                moved = [n for n, t in weights_of(net).items() if n in session.mask and not torch.equal(t, before[n])]
                assert bool(moved) == (factor == 1)
                assert not any(bool(values.any()) for values in outside(session, optimizer))


# ---- what is left at the end


@pytest.mark.parametrize("name", OWN)
def test_a_finished_model_is_a_plain_network(name: str) -> None:
    net, plain, batches = build(name).train(), build(name), data(name)
    types = {path: type(module) for path, module in plain.named_modules()}
    ids = {path: id(param) for path, param in net.named_parameters()}
    attributes = {path: set(vars(module)) for path, module in plain.named_modules()}
    session, optimizer = Session(net, recipe()), OPTIMIZERS["adamw"](net.parameters())
    with session.drive(optimizer, batches, total_steps=TOTAL):
        for i in range(TOTAL):
            step(net, optimizer, batches[i % 3])
        running = logits(copy.deepcopy(net).eval(), inputs(name))
        assert session.metrics()["tost/ghost_skip/alpha"] == session.metrics()["tost/soft_activation/active"] == 0
    assert {path: type(module) for path, module in net.named_modules()} == types
    assert {path: id(param) for path, param in net.named_parameters()} == ids
    assert {path: set(vars(module)) for path, module in net.named_modules()} == attributes
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    wanted = logits(plain.eval(), inputs(name))
    assert torch.equal(logits(net.eval(), inputs(name)), wanted) and torch.equal(running, wanted)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(ids.values())
    assert {id(p) for p in optimizer.state} == set(ids.values())
    assert Mask.from_zeros(prunable(net)) == session.mask
    pickle.loads(pickle.dumps(net))


def test_finish_before_the_schedules_end_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = small()
    session = Session(net, recipe()).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=TOTAL)
    with caplog.at_level(logging.WARNING, logger="tost_plugins"):
        session.finish()
    (record,) = caplog.records
    assert record.getMessage().startswith("finish at step 0, before the schedules ended")


def test_a_session_that_never_started_gives_the_model_back() -> None:
    net = small()
    before = weights_of(net)
    report = Session(net, recipe()).attach().finish()
    assert equal(weights_of(net), before) and report.sparsity == 0


def test_the_mask_can_be_kept_while_a_finished_model_trains_on() -> None:
    net, optimizer = small(), None
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with session.drive(optimizer, total_steps=1):
        step(net, optimizer, few()[0])
    mask = session.mask
    again = torch.optim.Adam(net.parameters(), lr=0.01)
    with session.drive(again, total_steps=5):
        for _ in range(3):
            step(net, again, few()[0])
            assert not any(bool(values.any()) for values in outside(session, again))
    assert session.mask == mask == Mask.from_zeros(prunable(net)) and session.state == "finished"


# ---- counts


def test_counts_by_hand() -> None:
    net = small()
    session = Session(net, recipe(mask={"kind": "random", "sparsity": 0.5, "allocation": "uniform"}))
    session.attach().start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=TOTAL)
    report = session.report()
    assert (report.sparsity, report.layers) == (0.5, 3)
    assert (report.active_parameters, report.ghost_parameters, report.total_parameters) == (140, 24, 234)
    assert report.rows == [
        {
            "layer": "0.weight",
            "shape": [4, 1, 3, 3],
            "kept": 18,
            "density": 0.5,
            "live": 18,
            "channels": 4,
            "dead_channels": 0,
        },
        {
            "layer": "3.weight",
            "shape": [4, 4, 3, 3],
            "kept": 72,
            "density": 0.5,
            "live": 51,
            "channels": 4,
            "dead_channels": 1,
        },
        {"layer": "7.weight", "shape": [2, 4], "kept": 4, "density": 0.5, "live": 4, "channels": 2, "dead_channels": 0},
    ]
    assert (report.live, report.effective_sparsity) == (73, 1 - 73 / 188)  # nobody reads one channel
    idle = "(effective 0.6117: of the kept weights 0.7766 are live)"
    assert str(report) == f"sparsity 0.5000 {idle} over 3 layers, 140 active parameters (24 of them ghosts) of 234"
    metrics = session.metrics()
    assert metrics == {
        "tost/sparsity": 0.5,
        "tost/live": 73.0,
        "tost/active_parameters": 140.0,
        "tost/ghost_parameters": 24.0,
        "tost/ghost_skip/alpha": 1.0,
        "tost/soft_activation/beta": 1.0,
        "tost/soft_activation/active": 1.0,
    }
    session.after_step(step=5)  # ghosts are dormant, and there
    assert session.metrics()["tost/ghost_skip/alpha"] == 0 and session.metrics()["tost/ghost_parameters"] == 24
    session.after_step(step=TOTAL)
    final = session.finish()
    assert (final.active_parameters, final.ghost_parameters, final.total_parameters) == (116, 0, 210)
    assert str(final) == f"sparsity 0.5000 {idle} over 3 layers, 116 active parameters of 210"
    assert session.metrics()["tost/active_parameters"] == 116


# ---- checkpoints


def frozen_copy(*states: Any) -> list[Any]:
    """As from a file that is loaded without unpickling code."""
    buffer = io.BytesIO()
    torch.save(list(states), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Interrupted(Exception):
    pass


@functools.cache
def reference(name: str, optimizer: str) -> tuple[dict[str, Tensor], list[list[Any]], dict[str, Tensor]]:
    """The weights after an uninterrupted run, a checkpoint after each of its steps, and AdamW's or SGD's last state."""
    net, batches = build(name).train(), data(name)
    session = Session(net, recipe()).attach()
    made = OPTIMIZERS[optimizer](net.parameters())
    checkpoints = []
    with session.drive(made, batches, total_steps=TOTAL):
        for i in range(TOTAL):
            step(net, made, batches[i % 3])
            checkpoints.append(frozen_copy(net.state_dict(), made.state_dict(), session.state_dict()))
    return weights_of(net), checkpoints, state_of(net, made)


def state_of(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, param in net.named_parameters()
        for key, value in optimizer.state[param].items()
        if isinstance(value, Tensor)
    }


def stranger(name: str) -> nn.Module:
    """The network with other weights, as a fresh process would make it."""
    net = build(name).train()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.1)
    return net


ORDERS = list(itertools.permutations(("model", "optimizer", "session")))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("inside", [False, True], ids=["before start", "after start"])
@pytest.mark.parametrize("stop", [2, 5, 8], ids=["ghosts live", "ghosts dormant", "relu again"])
def test_a_run_resumes_bit_for_bit(stop: int, inside: bool, order: tuple[str, ...]) -> None:
    resumed("functional", "adamw", stop, inside, order)


@pytest.mark.parametrize("name", ["plain", "shared", "depthwise", "signal"])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7, 9])
def test_runs_of_other_networks_resume_bit_for_bit(name: str, stop: int) -> None:
    resumed(name, "sgd", stop, inside=bool(stop % 2), order=ORDERS[0])


def resumed(name: str, optimizer: str, stop: int, inside: bool, order: tuple[str, ...]) -> None:
    wanted, checkpoints, wanted_state = reference(name, optimizer)
    saved = dict(zip(("model", "optimizer", "session"), copy.deepcopy(checkpoints[stop - 1]), strict=True))
    net, batches = stranger(name), data(name)
    session = Session(net, recipe()).attach()
    made = OPTIMIZERS[optimizer](net.parameters())
    parts = {"model": net, "optimizer": made, "session": session}

    def load() -> None:
        for part in order:
            parts[part].load_state_dict(saved[part])

    if not inside:
        load()
    with session.drive(made, batches, total_steps=TOTAL):
        if inside:
            load()
        for i in range(stop, TOTAL):
            step(net, made, batches[i % 3])
            assert session.clock.step == i + 1
    assert equal(weights_of(net), wanted)
    assert equal(state_of(net, made), wanted_state)


def test_an_optimizer_made_before_attach_resumes_after_start() -> None:
    def run(net: nn.Module, stop: int, saved: list[Any] | None = None) -> list[Any]:
        made, batches = OPTIMIZERS["sgd"](net.parameters()), data("functional")
        session, first = Session(net, recipe()), 0
        with contextlib.suppress(Interrupted), session.drive(made, batches, total_steps=TOTAL):
            if saved is not None:
                for part, state in zip((net, made, session), saved, strict=True):
                    part.load_state_dict(state)
                first = session.clock.step
            for i in range(first, stop):
                step(net, made, batches[i % 3])
            if stop < TOTAL:
                raise Interrupted
        return frozen_copy(net.state_dict(), made.state_dict(), session.state_dict())

    wanted = run(build("functional").train(), TOTAL)
    found = run(stranger("functional"), TOTAL, run(build("functional").train(), 3))
    assert equal(found[0], wanted[0])


def test_loading_an_older_checkpoint_in_the_middle_of_a_run_goes_back() -> None:
    wanted, checkpoints, _ = reference("functional", "sgd")
    net, batches = build("functional").train(), data("functional")
    session = Session(net, recipe()).attach()
    made = OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, batches, total_steps=TOTAL):
        for i in range(9):  # by now ReLU is itself again
            step(net, made, batches[i % 3])
        net.load_state_dict(checkpoints[1][0])
        made.load_state_dict(copy.deepcopy(checkpoints[1][1]))
        assert logits(net, batches[0][0]).shape == (4, 4)  # a look at it, which changes BatchNorm's buffers
        net.load_state_dict(checkpoints[1][0])
        for i in range(2, TOTAL):
            step(net, made, batches[i % 3])
    assert equal(weights_of(net), wanted)


def test_assigned_tensors_resume_bit_for_bit() -> None:
    wanted, checkpoints, _ = reference("functional", "adamw")
    model, optimizer, state = copy.deepcopy(checkpoints[4])
    net, batches = stranger("functional"), data("functional")
    session = Session(net, recipe()).attach()
    net.load_state_dict(model, assign=True)
    made = OPTIMIZERS["adamw"](net.parameters())
    made.load_state_dict(optimizer)
    session.load_state_dict(state)
    with session.drive(made, batches, total_steps=TOTAL):
        for i in range(5, TOTAL):
            step(net, made, batches[i % 3])
    assert equal(weights_of(net), wanted)


def test_assigned_tensors_that_the_optimizer_does_not_train_are_an_error() -> None:
    _, checkpoints, _ = reference("functional", "adamw")
    net, batches = stranger("functional"), data("functional")
    session = Session(net, recipe()).attach()
    made = OPTIMIZERS["adamw"](net.parameters())
    net.load_state_dict(copy.deepcopy(checkpoints[4][0]), assign=True)
    with pytest.raises(TostError, match="optimizer: expected one that trains every prunable weight of the model"):
        session.start(made, batches, total_steps=TOTAL)


def test_the_length_of_a_run_stays_that_of_its_start() -> None:
    tweaks = [{"kind": "ghost_skip", "until": "0.5dur"}]
    net, batches = small().train(), few()
    session, made = Session(net, recipe(tweaks=tweaks)), torch.optim.SGD(net.parameters(), lr=0.1)
    with contextlib.suppress(Interrupted), session.drive(made, batches, total_steps=20, steps_per_epoch=5):
        for i in range(5):
            step(net, made, batches[i % 2])
        raise Interrupted
    saved = frozen_copy(net.state_dict(), session.state_dict())
    assert saved[1]["clock"] == [5, 20, 5]
    again = small()
    resumed = Session(again, recipe(tweaks=tweaks)).attach()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.start(torch.optim.SGD(again.parameters(), lr=0.1), batches, total_steps=100, steps_per_epoch=50)
    assert (resumed.clock.step, resumed.clock.total_steps, resumed.clock.steps_per_epoch) == (5, 20, 5)
    assert resumed.metrics()["tost/ghost_skip/alpha"] == 0.5


def test_the_state_is_json_and_only_primitives() -> None:
    def primitive(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and primitive(item) for key, item in value.items())
        return all(map(primitive, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))

    net = small()
    session = Session(net, recipe())
    for advance in (session.attach, lambda: session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=3)):
        assert primitive(session.state_dict())
        assert json.loads(json.dumps(session.state_dict())) == session.state_dict()
        advance()
    assert json.loads(json.dumps(session.state_dict())) == session.state_dict()
    assert session.state_dict()["state"] == "running" and session.state_dict()["clock"] == [0, 3, None]


def test_a_checkpoint_of_another_recipe_is_refused() -> None:
    state = Session(small(), recipe()).attach().state_dict()
    other = Session(small(), recipe(tweaks=TWEAKS[:1])).attach()
    with pytest.raises(
        TostError, match=r"load_state_dict: expected a checkpoint of the same tweaks, got .*; resume with"
    ):
        other.load_state_dict(state)
    other = Session(small(), recipe(mask={"kind": "random", "sparsity": 0.7})).attach()
    with pytest.raises(TostError, match=r"the same mask, got .*0\.6.*; resume with"):
        other.load_state_dict(state)
    Session(small(), recipe(seed=0, name="renamed")).attach().load_state_dict(state)


@pytest.mark.parametrize("order", [("model", "session"), ("session", "model")], ids="-".join)
def test_the_checkpoint_of_a_finished_run_is_that_of_a_plain_network(order: tuple[str, ...]) -> None:
    net = small()
    session, made = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(made, total_steps=1):
        step(net, made, few()[0])
    saved = dict(zip(("model", "session"), frozen_copy(net.state_dict(), session.state_dict()), strict=True))
    again = small()
    resumed = Session(again, recipe()).attach()
    parts = {"model": again, "session": resumed}
    for part in order:
        parts[part].load_state_dict(saved[part])
    assert resumed.state == "finished" and list(again.state_dict()) == list(saved["model"])
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    with resumed.drive(optimizer, total_steps=1):
        assert resumed.mask == session.mask
        step(again, optimizer, few()[0])
        assert not any(bool(values.any()) for values in outside(resumed, optimizer))
    assert resumed.state == "finished"


def test_weights_of_a_plain_network_load_into_an_attached_one() -> None:
    net, plain = build("functional"), stranger("functional")
    Session(net, recipe()).attach()
    ghosts = {name: tensor.clone() for name, tensor in net.state_dict().items() if "ghost_skip" in name}
    result = net.load_state_dict(plain.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in ghosts.items())
    holder = nn.Sequential(net)  # inside another module, as under a wrapper
    holder.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()}, strict=True)
    incomplete = {name: tensor for name, tensor in plain.state_dict().items() if name != "fc.weight"}
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        net.load_state_dict(incomplete, strict=True)


def test_weights_of_a_plain_network_loaded_into_a_running_one_are_masked() -> None:
    net, plain = build("functional"), stranger("functional")
    session, made = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(made, total_steps=2):
        mask = session.mask
        net.load_state_dict(plain.state_dict())
        step(net, made, data("functional")[0])
        assert session.mask == mask and session.clock.step == 1
        assert not any(bool(values.any()) for values in outside(session, made))


def test_copies_of_an_attached_model_stand_alone() -> None:
    net, x = build("functional"), inputs("functional")
    session, made = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(made, total_steps=TOTAL):
        average = AveragedModel(net)
        twin = pickle.loads(pickle.dumps(net))
        for i in range(3):
            step(net, made, data("functional")[i])
        before = logits(twin.eval(), x)
        average.update_parameters(net)
        assert torch.equal(before, logits(twin, x)) and not torch.equal(before, logits(net.eval(), x))
        assert torch.equal(logits(average.eval(), x), logits(net, x))
        assert not any(bool(v.any()) for v in outside(session))
        twin.load_state_dict(net.state_dict())  # a copy is no session's: loading it changes none
        assert session.clock.step == 3


# ---- errors in start


class WrongShape:
    """Batches of images with one channel too many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.randn(4, 2, 6, 6), torch.zeros(4, dtype=torch.long))])


def masks_of(net: nn.Module, **changes: Tensor | None) -> Mask:
    tensors = {name: torch.ones(param.shape, dtype=torch.bool) for name, param in prunable(net).items()}
    tensors |= {name.replace("_", "."): value for name, value in changes.items() if value is not None}
    return Mask({name: t for name, t in tensors.items() if changes.get(name.replace(".", "_"), t) is not None})


STARTS: list[tuple[str, dict[str, Any], Any, dict[str, Any], str]] = [
    ("synflow on other images", {"mask": {"kind": "synflow", "sparsity": 0.5}}, WrongShape(), {}, "synflow: expected a"),
    ("snip without batches", {"mask": {"kind": "snip", "sparsity": 0.5}}, None, {}, "expected batches to look at, got None"),
    ("snip on no batches", {"mask": {"kind": "snip", "sparsity": 0.5}}, [], {}, "expected at least one batch, got an empty"),
    ("snip on an iterator", {"mask": {"kind": "snip", "sparsity": 0.5}}, "iterator", {}, "read twice, got a one-shot"),
    ("a collapsed layer", {"mask": {"kind": "magnitude", "sparsity": 0.98, "allocation": "uniform"}}, None, {}, "7.weight"),
    ("init without batches", {"tweaks": [{"kind": "rescaled_init", "iterations": 1}]}, None, {}, "rescaled_init: expected"),
    ("a missing layer", {}, None, {"3_weight": None}, "mask: expected a layer 3.weight, got none; add it"),
    ("a misshapen layer", {}, None, {"7_weight": torch.ones(4, 2)}, r"expected shape \(2, 4\) for 7.weight, got \(4, 2\)"),
    ("an empty layer", {}, None, {"7_weight": torch.zeros(2, 4)}, "the given mask: expected a path .* ends at 7.weight"),
    ("epochs of unknown length", {"tweaks": [{"kind": "ghost_skip", "until": "2ep"}]}, None, {}, "ghost_skip.until: time '2ep'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "batches", "given", "message"), STARTS, ids=[case[0] for case in STARTS])
def test_an_error_in_start_leaves_weights_and_session_as_they_were(
    name: str, changes: dict[str, Any], batches: Any, given: dict[str, Any], message: str
) -> None:
    net = small()
    session = Session(net, recipe(**changes), mask=masks_of(net, **given) if given else None).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with unchanged(session), pytest.raises(TostError, match=message) as error:
        session.start(optimizer, iter(few()) if batches == "iterator" else batches, total_steps=TOTAL)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    with pytest.raises(TostError, match="got state 'attached'"):
        _ = session.mask


def test_start_can_be_tried_again() -> None:
    net = small()
    session = Session(net, recipe(mask={"kind": "snip", "sparsity": 0.5})).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TostError):
        session.start(optimizer, [], total_steps=TOTAL)
    session.start(optimizer, few(), total_steps=TOTAL)
    assert session.state == "running" and session.mask.sparsity == 0.5
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held)) == len(list(net.parameters()))


def test_a_given_mask_is_the_mask() -> None:
    net = small()
    chosen = torch.zeros(2, 4)
    chosen[0, 1] = chosen[1, 3] = 1
    mask = masks_of(net, **{"7_weight": chosen})
    session = Session(net, recipe(), mask=mask)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(optimizer, total_steps=1):
        step(net, optimizer, few()[0])
    assert session.mask == mask and torch.equal(net[7].weight != 0, chosen.bool())


def test_masks_are_found_on_the_network_without_ghosts_and_soft_activations() -> None:
    batches = data("functional")
    found = []
    for tweaks in ([], TWEAKS):
        net = build("functional").train()
        session = Session(net, recipe(mask={"kind": "snip", "sparsity": 0.7}, tweaks=tweaks)).attach()
        session.start(OPTIMIZERS["sgd"](net.parameters()), batches, total_steps=TOTAL)
        found.append(session.mask)
    assert found[0] == found[1]


# ---- nothing is silent


def test_optional_tweaks_that_do_not_fit_are_left_out_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 2))
    tweaks = [{**tweak, "optional": True} for tweak in TWEAKS] + [{"kind": "rescaled_init", "iterations": 1}]
    session, optimizer = Session(net, recipe(tweaks=tweaks)), torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO, logger="tost_plugins"):
        session.attach().start(optimizer, few(), total_steps=TOTAL)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "\n" not in line and "rescaled_init; left out: ghost_skip (expected a convolution" in line
    assert "soft_activation (expected nn.ReLU" in line
    left = session.report().left_out
    assert [entry.split(" ")[0] for entry in left] == ["ghost_skip", "soft_activation"]
    assert session.finish().left_out == left


class Once(torch.autograd.Function):
    """Written without what torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


@pytest.mark.parametrize("optional", [False, True])
def test_a_tweak_that_finds_out_in_start_that_it_does_not_fit(optional: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Custom(), nn.Linear(4, 2))
    tweaks = [{"kind": "rescaled_init", "iterations": 1, "optional": optional}]
    session, optimizer = Session(net, recipe(tweaks=tweaks)).attach(), torch.optim.SGD(net.parameters(), lr=0.1)
    if not optional:
        with unchanged(session), pytest.raises(TostError, match="expected a network that can be differentiated twice"):
            session.start(optimizer, few(), total_steps=TOTAL)
        return
    session.start(optimizer, few(), total_steps=TOTAL)
    (entry,) = session.report().left_out
    assert entry.startswith("rescaled_init (")


SMOOTHING = {"kind": "label_smoothing", "alpha": 0.2}


def test_label_smoothing_that_is_never_used_is_an_error() -> None:
    net = small()
    session, optimizer = Session(net, recipe(tweaks=[SMOOTHING])), torch.optim.SGD(net.parameters(), lr=0.1)
    message = (
        r"label_smoothing: expected a training loss that it can act on, got one that never came by; make the training loss "
        r"with session.criterion\(loss_fn\), or leave label_smoothing out of the tweaks"
    )
    with pytest.raises(TostError, match=message), session.drive(optimizer, few(), total_steps=TOTAL):
        before = weights_of(net)
        try:
            step(net, optimizer, few()[0])
        finally:
            assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


def test_optional_label_smoothing_that_is_never_used_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    net = small()
    session = Session(net, recipe(tweaks=[{**SMOOTHING, "optional": True}]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with (
        caplog.at_level(logging.WARNING, logger="tost_plugins"),
        session.drive(optimizer, few(), total_steps=TOTAL),
    ):
        for _ in range(3):
            step(net, optimizer, few()[0])
    (record,) = caplog.records
    assert record.getMessage().startswith("label_smoothing: expected a training loss")
    assert session.report().left_out == ("label_smoothing (the loss never came by)",)


def test_label_smoothing_is_in_the_training_loss_only() -> None:
    net, (batch, *_) = small(), few()
    session, optimizer = Session(net, recipe(tweaks=[SMOOTHING])), torch.optim.SGD(net.parameters(), lr=0.1)
    loss_fn = session.criterion(F.cross_entropy)
    hard = F.cross_entropy(net(batch[0]), batch[1])
    assert torch.equal(loss_fn(net(batch[0]), batch[1]), hard)  # before start
    with session.drive(optimizer, few(), loss_fn, total_steps=TOTAL):
        for mode in (True, False):
            net.train(mode)
            out = net(batch[0])
            wanted = F.cross_entropy(out, batch[1], label_smoothing=0.2 if mode else 0.0)
            torch.testing.assert_close(loss_fn(out, batch[1]), wanted)
        net.train()
        step(net, optimizer, batch, loss_fn)
    out = net(batch[0])
    assert torch.equal(loss_fn(out, batch[1]), F.cross_entropy(out, batch[1]))  # after finish
    assert Session(small(), recipe()).criterion(F.cross_entropy) is F.cross_entropy


def test_label_smoothing_forgotten_on_resume_is_an_error() -> None:
    net, batches = small(), few()
    session, optimizer = Session(net, recipe(tweaks=[SMOOTHING])), torch.optim.SGD(net.parameters(), lr=0.1)
    loss_fn = session.criterion(F.cross_entropy)
    with contextlib.suppress(Interrupted), session.drive(optimizer, batches, total_steps=TOTAL):
        step(net, optimizer, batches[0], loss_fn)
        raise Interrupted
    again = small()
    resumed = Session(again, recipe(tweaks=[SMOOTHING])).attach()
    again.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    with (
        pytest.raises(TostError, match="got one that never came by"),
        resumed.drive(optimizer, batches, total_steps=TOTAL),
    ):
        step(again, optimizer, batches[1])


def test_label_smoothing_with_a_closure() -> None:
    net, (batch, *_) = small(), few()
    session, optimizer = Session(net, recipe(tweaks=[SMOOTHING])), torch.optim.SGD(net.parameters(), lr=0.1)

    def closure(loss_fn: Any) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(net(batch[0]), batch[1])
        loss.backward()
        return loss

    with session.drive(optimizer, total_steps=TOTAL):
        optimizer.step(lambda: closure(session.criterion(F.cross_entropy)))
    net = small()
    session, optimizer = Session(net, recipe(tweaks=[SMOOTHING])), torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TostError, match="never came by"), session.drive(optimizer, total_steps=TOTAL):
        optimizer.step(lambda: closure(F.cross_entropy))


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_criterion_that_smooths_twice_is_an_error(loss_fn: Any) -> None:
    session = Session(small(), recipe(tweaks=[SMOOTHING]))
    with pytest.raises(TostError, match="got one that smooths them already"):
        session.criterion(loss_fn)
    with pytest.raises(TostError, match="got one that smooths them already"):
        session.criterion(session.criterion(F.cross_entropy))


def test_norms_that_were_converted_after_attach_are_an_error() -> None:
    net = small()
    session = Session(net, recipe()).attach()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert converted is net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = weights_of(net)
    with pytest.raises(TostError, match=r"ghost_skip: expected .* at attach, got new ones at 4, .* before attach"):
        session.start(optimizer, total_steps=TOTAL)
    assert equal(weights_of(net), before) and session.state == "attached"


def test_norms_that_were_converted_before_attach_are_fine() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    session = Session(net, recipe()).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=TOTAL)
    assert session.report().ghost_parameters == 24
    assert torch.isfinite(net.eval()(few()[0][0])).all()
    session.finish()
    assert type(net[4]) is nn.SyncBatchNorm


@pytest.mark.parametrize("path", ["0", "2", "3", "4", "7"])
def test_modules_that_were_replaced_after_attach_are_an_error(path: str) -> None:
    net, fresh = small(), small()
    session = Session(net, recipe()).attach()
    net[int(path)] = fresh[int(path)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TostError, match=rf"expected .* at attach, got .*\b{path}\b") as error:
        session.start(optimizer, total_steps=TOTAL)
    assert session.state == "attached" and "before attach" in str(error.value)


# ---- other shapes of models


def test_tied_weights_are_masked_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten = nn.Flatten()
            self.first = nn.Linear(36, 36)
            self.second = nn.Linear(36, 36)
            self.second.weight = self.first.weight
            self.twice = nn.Linear(36, 2)
            self.alias = self.twice

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(torch.relu(self.second(torch.relu(self.first(self.flatten(x))))))

    net = Tied()
    keys = list(net.state_dict())
    session, optimizer = Session(net, recipe(tweaks=TWEAKS[1:])), OPTIMIZERS["adam"](net.parameters())
    with session.drive(optimizer, total_steps=3):
        assert list(session.mask) == ["first.weight", "twice.weight"]
        for _ in range(3):
            step(net, optimizer, few()[0])
        assert not any(bool(values.any()) for values in outside(session, optimizer))
        saved = frozen_copy(net.state_dict())[0]
        Session(Tied(), recipe(tweaks=TWEAKS[1:])).attach().model.load_state_dict(saved, strict=True)
    assert list(net.state_dict()) == keys and net.second.weight is net.first.weight and net.alias is net.twice
    assert session.mask == Mask.from_zeros(prunable(net))


def test_a_frozen_backbone_stays() -> None:
    net = build("functional").train()
    for name, param in net.named_parameters():
        param.requires_grad_(name.startswith("fc"))
    tweaks = [{**tweak, "optional": True} for tweak in TWEAKS]  # neither has anything to act on
    session, optimizer = Session(net, recipe(tweaks=tweaks)), OPTIMIZERS["sgd"](net.fc.parameters())
    with session.drive(optimizer, total_steps=TOTAL):
        before = weights_of(net)
        for i in range(TOTAL):
            step(net, optimizer, data("functional")[i % 3])
        assert not any(bool(values.any()) for values in outside(session, optimizer))
        moved = [n for n, p in net.named_parameters() if not torch.equal(before[n], p)]
        assert moved == ["fc.weight", "fc.bias"]
    assert not any(p.requires_grad for n, p in net.named_parameters() if not n.startswith("fc"))


def test_a_model_moved_to_another_dtype_goes_on() -> None:
    net = small().train()
    session, optimizer = Session(net, recipe()), OPTIMIZERS["sgd"](net.parameters())
    x, y = few()[0]
    with session.drive(optimizer, total_steps=TOTAL):
        step(net, optimizer, (x, y))
        net.double()
        optimizer.state.clear()
        for _ in range(2):
            step(net, optimizer, (x.double(), y))
            assert not any(bool(values.any()) for values in outside(session, optimizer))
        assert session.clock.step == 3


def test_models_and_sessions_that_nobody_holds_are_freed() -> None:
    import gc
    import weakref

    net = small()
    session, optimizer = Session(net, recipe()), torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(optimizer, total_steps=1):
        step(net, optimizer, few()[0])
    watch = weakref.ref(net), weakref.ref(session)
    del net, session, optimizer
    gc.collect()
    assert [ref() for ref in watch] == [None, None]


def test_a_compiled_model_trains_as_the_eager_one() -> None:
    batches, found = few(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = small().train()
        session = Session(net, recipe()).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        with session.drive(optimizer, batches, total_steps=TOTAL):
            for i in range(TOTAL):
                step(run, optimizer, batches[i % 2])
        found.append(weights_of(net))
    torch._dynamo.reset()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-4)


# ---- ranks


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(root / "tests/ranks/session_ddp.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and len(list(tmp_path.glob("*.pt"))) == 2, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key in ("started", "trained", "finished", "optimizer"):
        assert equal(first[key], second[key]), key
    assert not equal(first["started"], first["trained"])
    assert first["states"] == second["states"] and len(set(first["states"])) == 8
    assert first["sent"] == first["untouched"] == second["sent"] and sum(first["sent"].values()) >= 3
    assert first["outside"] == [] and first["norms"] == second["norms"] and max(first["norms"]) > 0.5
    assert first["alphas"] == second["alphas"] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert second["mask stayed"] and second["statistics came"]
    assert list(first["finished"]) == [name for name in build("functional").state_dict() if "running" not in name]
    zeros = Mask.from_zeros({name: first["finished"][name] for name in prunable(build("functional"))})
    assert zeros.sparsity == pytest.approx(0.6, abs=0.01)
