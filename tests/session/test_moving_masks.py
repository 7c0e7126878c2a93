"""Masks that move: by hand on one layer of 8 weights, the laws for all of them, and whatever may come between a gradient
and a step."""

import contextlib
import copy
import functools
import io
import itertools
import logging
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import moving_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from moving_cases import AFTER, COUNTS, DRAWN, HIDES, MOVES, MOVING, STEPS, Digits, digits
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tost_plugins import Mask, Session, TostError
from tost_plugins.lab.export import export
from tost_plugins.masks import MASKS
from tost_plugins.masks.allocation import allocate
from tost_plugins.masks.topk import drop_and_grow
from tost_plugins.training import seeds
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable

CASES = list(MOVING)


class Lamb(Optimizer):
    """As people write it: Adam's direction, as long in each tensor as its weights are."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure and torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                first, second = (state.setdefault(key, torch.zeros_like(param)) for key in ("m", "v"))
                first.lerp_(param.grad, 0.1)
                second.lerp_(param.grad**2, 0.01)
                update = first / (second.sqrt() + 1e-6) + 0.01 * param
                param -= group["lr"] * update * param.norm().clamp(1e-3, 10) / update.norm().clamp_min(1e-6)
        return loss


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "lamb": Lamb,
}
BATCHES = digits(STEPS)


def recipe(case: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"mask": MOVING[case] if isinstance(case, str) else case, **changes}


def step(net: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def state_of(optimizer: Optimizer, param: nn.Parameter) -> list[Tensor]:
    """What the optimizer keeps in a weight's own shape."""
    found = optimizer.state.get(param, {}).values()
    return [value for value in found if isinstance(value, Tensor) and value.shape == param.shape]


def history(
    case: str | dict[str, Any], optimizer: str = "sgd", net: nn.Module | None = None, **changes: Any
) -> list[Mask]:
    """The mask at the start and after each of ten steps."""
    net = net or Digits()
    session, made = Session(net, recipe(case, **changes)), OPTIMIZERS[optimizer](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        found = [session.mask]
        for batch in BATCHES:
            step(net, made, batch)
            found.append(session.mask)
    return found


# ---- by hand: a row of 8 weights whose gradient is the input


class Row(nn.Module):
    """Eight weights; the derivative of the output by them is the input."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.row = nn.Linear(8, 1, bias=False)
        self.row.weight.data[0] = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x)


def bits(text: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in text]])


FALLING = [8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0]
KEPT = [8.0, -7.0, 6.0, -5.0, 0.0, 0.0, 0.0, 0.0]

#: Layers of as many weights, and two sparsities: with 8 of 12 weights the first has more of its own than with 9.
PARADOX, FALL = {"a": 2, "b": 5, "c": 5}, (1 - 9 / 12, 1 - 8 / 12)

# for each step: the gradient, and the weights and the mask after it, with plain SGD at a learning rate of 1
Table = list[tuple[list[float], list[float], str]]
DROPS = {
    "sparsity": 0.5,
    "every": "2ba",
    "until": "8ba",
    "drop": 0.6,
}  # of 4 kept: 2.05, so 2, at step 2; 1.2 at step 4
RIGL: Table = [
    ([1, 1, 1, 1, 9, 0, 0, 9], [7, -8, 5, -6, 0, 0, 0, 0], "11110000"),
    ([1, -1, 1, -1, 9, 0, 0, 9], [6, -7, 4, -5, 0, 0, 0, 0], "11110000"),
    ([9, 9, 0, 0, 1, -4, 3, -2], [6, -7, 0, 0, 0, 0, 0, 0], "11000110"),  # 4 and -5 go; -4 and 3 pull most
    ([1, 0, 5, 5, 5, -2, -3, 5], [5, -7, 0, 0, 0, 2, 3, 0], "11000110"),
    ([9, 9, 1, -6, 2, 5, 9, 3], [5, -7, 0, 0, 0, 0, 3, 0], "11010010"),  # 2 goes; -6 pulls most
    ([0, 0, 0, 4, 0, 9, 0, 0], [5, -7, 0, -4, 0, 0, 3, 0], "11010010"),
]
DNW: Table = [
    ([3, 0, 0, 0, -2, 0, 0, 0], [5, -7, 6, 0, 6, 0, 0, 0], "11101000"),  # 5 before -5: ties go to the lower index
    (
        [2, 0, 0, 1, 0, 5, 0, 0],
        [0, -7, 6, -6, 0, -8, 0, 0],
        "01110100",
    ),  # -3 - 5 comes from out of sight; 6 of index 4 goes
    ([0, 0, 0, 0, -3, 0, 0, 0], [0, -7, 6, 0, 9, -8, 0, 0], "01101100"),  # 6 + 3 is back; 6 before -6
]
FROZEN: Table = [*DNW[:2], ([1, 1, 1, 1, -3, 1, 1, 1], [0, -8, 5, -7, 0, -9, 0, 0], "01110100")]
GRADUAL: Table = [  # 2.75 of 8, so 3, at step 2; 2 at step 4
    ([4, 0, 0, 0, 0, 0, 0, -5], [4, -7, 6, -5, 4, -3, 2, 4], "11111111"),
    ([0, 0, 0, -1, 0, 0, 0, 0], [4, -7, 6, 0, 0, 0, 0, 0], "11100000"),
    ([-3, 0, 3, 9, 9, 9, 9, 9], [7, -7, 3, 0, 0, 0, 0, 0], "11100000"),
    ([0, 0, 9, 9, 9, 9, 9, 9], [7, -7, 0, 0, 0, 0, 0, 0], "11000000"),  # 3 - 9 = -6 is the smallest all the same
    ([0, 0, 9, 9, 9, 9, 9, 9], [7, -7, 0, 0, 0, 0, 0, 0], "11000000"),
]
TABLES: dict[str, tuple[dict[str, Any], list[float], Table]] = {
    "rigl": ({"kind": "rigl", **DROPS}, KEPT, RIGL),
    "dnw": ({"kind": "dnw", "sparsity": 0.5}, FALLING, DNW),
    "dnw_frozen": ({"kind": "dnw", "sparsity": 0.5, "freeze": "2ba"}, FALLING, FROZEN),
    "gradual": ({"kind": "gradual", "sparsity": 0.75, "until": "4ba", "every": "2ba"}, FALLING, GRADUAL),
}


@contextlib.contextmanager
def row(method: dict[str, Any], weights: list[float], start: str = "11110000", **settings: Any) -> Iterator[Any]:
    """A running session on a row; gives what makes a step with some gradients (each a micro-batch's)."""
    net = Row(weights)
    mask = None if method["kind"] == "gradual" else Mask({"row.weight": bits(start)})
    session = Session(net, recipe(method), mask)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, **settings)
    with session.drive(optimizer, total_steps=10):

        def go(*gradients: list[float]) -> Session:
            optimizer.zero_grad()
            for gradient in gradients:
                net(torch.tensor([gradient], dtype=torch.float32)).sum().backward()
            optimizer.step()
            return session

        go.net, go.session, go.optimizer = net, session, optimizer
        yield go


@pytest.mark.parametrize("name", TABLES)
def test_tables_by_hand_in_a_loop(name: str) -> None:
    method, weights, table = TABLES[name]
    with row(method, weights) as go:
        for gradient, after, mask in table:
            session = go(gradient)
            assert go.net.row.weight.tolist() == [after]
            assert torch.equal(session.mask["row.weight"], bits(mask))


def test_set_by_hand_in_a_loop() -> None:
    with row({"kind": "set", **DROPS}, KEPT) as go:
        for (gradient, *_), stays, weights in zip(
            RIGL[:3], (None, None, [0, 1]), ([7, -8, 5, -6], [6, -7, 4, -5], [6, -7]), strict=True
        ):
            session = go(gradient)
            if stays is None:
                assert go.net.row.weight[0, :4].tolist() == weights
                continue
            drawn = torch.rand(1, 8, generator=seeds.generator(0, 2))[0].tolist()
            comes = sorted((i for i in range(8) if i not in stays), key=lambda i: -drawn[i])[:2]
            assert session.mask["row.weight"][0].nonzero().flatten().tolist() == sorted([*stays, *comes])
            assert go.net.row.weight[0, :2].tolist() == weights
            came_back = {i: [4.0, -5.0][i - 2] for i in comes if i in (2, 3)}  # drawn again, it stays as it was
            assert go.net.row.weight[0, 2:].tolist() == [came_back.get(i, 0.0) for i in range(2, 8)]


def test_rigl_by_hand_in_update() -> None:
    method, mask = MASKS["rigl"](**DROPS), {"w": bits("11110000")}
    for at, weights in ((2, RIGL[1][1]), (4, RIGL[3][1])):
        gradient, _, wanted = RIGL[at]
        given = {"w": torch.tensor([weights]).float()}, {"w": torch.tensor([gradient]).float()}
        mask = method.update(mask, *given, Clock(at), torch.Generator())
        assert torch.equal(mask["w"], bits(wanted))


def test_set_by_hand_in_update() -> None:
    method, weights = MASKS["set"](**DROPS), {"w": torch.tensor([[6.0, -7.0, 4.0, -5.0, 0, 0, 0, 0]])}
    seen = set()
    for seed in range(60):
        new = method.update({"w": bits("11110000")}, weights, {}, Clock(2), seeds.generator(seed))["w"][0]
        assert new[:2].all() and int(new.sum()) == 4
        seen |= set(new.nonzero().flatten().tolist())
    assert seen == set(range(8))  # every place is drawn now and then, also those just left


def test_dnw_and_gradual_by_hand_in_update() -> None:
    method, mask = MASKS["dnw"](sparsity=0.5), {"w": bits("11110000")}
    for weights, wanted in (
        ([5, -7, 6, -5, 6, -3, 2, -1], "11101000"),
        ([3, -7, 6, -6, 6, -8, 2, -1], "01110100"),
    ):
        mask = method.update(mask, {"w": torch.tensor([weights]).float()}, {}, Clock(1), torch.Generator())
        assert torch.equal(mask["w"], bits(wanted))
    method, mask = MASKS["gradual"](sparsity=0.75, until="4ba", every="2ba"), {"w": bits("11111111")}
    for at, weights, wanted in (
        (2, [4, -7, 6, -4, 4, -3, 2, 4], "11100000"),
        (4, [7, -7, -6, 99, 0, 0, 0, 0], "11000000"),  # what is gone stays gone, whatever stands there
    ):
        mask = method.update(mask, {"w": torch.tensor([weights]).float()}, {}, Clock(at), torch.Generator())
        assert torch.equal(mask["w"], bits(wanted))


def test_dnw_computes_with_the_kept_weights_and_trains_all() -> None:
    with row(TABLES["dnw"][0], FALLING) as go:
        ones = torch.ones(1, 8)
        assert float(go.net(ones)) == 8 - 7 + 6 - 5
        assert go.net.row.weight_hidden.tolist() == [[0, 0, 0, 0, 4, -3, 2, -1]]
        go(DNW[0][0])
        assert float(go.net(ones)) == 5 - 7 + 6 + 6
        assert go.net.row.weight_hidden.tolist() == [[0, 0, 0, -5, 0, -3, 2, -1]]


def test_frozen_dnw_trains_no_hidden_weights_any_more() -> None:
    with row(TABLES["dnw_frozen"][0], FALLING, momentum=0.9) as go:
        for gradient, *_ in FROZEN:
            session = go(gradient)
        assert not go.net.row.weight_hidden.any()
        assert not go.optimizer.state[go.net.row.weight]["momentum_buffer"][~session.mask["row.weight"]].any()
        assert not go.net.row.weight.grad[~session.mask["row.weight"]].any()


def test_changed_and_explored_by_hand() -> None:
    with row(TABLES["rigl"][0], KEPT) as go:
        found = []
        for gradient, *_ in RIGL:
            metrics = go(gradient).metrics()
            found.append((metrics["tost/mask/changed"], metrics["tost/mask/explored"]))
            assert metrics["tost/sparsity"] == 0.5 and metrics["tost/active_parameters"] == 4
    assert found == [(0, 0.5), (0, 0.5), (4, 0.75), (4, 0.75), (2, 0.75), (2, 0.75)]
    assert go.session.metrics()["tost/mask/changed"] == 2 and go.session.metrics()["tost/mask/explored"] == 0.75
    with row(TABLES["gradual"][0], FALLING) as go:
        assert [go(gradient).metrics()["tost/mask/changed"] for gradient, *_ in GRADUAL] == [0, 5, 5, 1, 1]
        assert go.session.metrics()["tost/mask/explored"] == 1


def test_rigl_grows_by_the_sum_of_all_micro_batches() -> None:
    """The last one alone would grow index 6, the first one index 4."""
    with row({"kind": "rigl", **DROPS, "every": "1ba", "drop": 0.3}, KEPT) as go:
        assert torch.equal(go([0] * 8, [0] * 8, [0] * 8).mask["row.weight"], bits("11110000"))
        session = go([0, 0, 0, 0, 5, 2, -4, 0], [0, 0, 0, 0, -5, 1, 4.5, 0])
        assert torch.equal(session.mask["row.weight"], bits("11100100")) and session.clock.step == 2


@given(data=st.data(), size=st.integers(1, 30))
def test_drop_and_grow_restated(data: Any, size: int) -> None:
    numbers = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    sizes, wishes = data.draw(numbers), data.draw(numbers)
    count = data.draw(st.integers(0, sum(kept)))
    inside = sorted((i for i in range(size) if kept[i]), key=lambda i: (-sizes[i], i))
    stay = inside[: len(inside) - count]
    come = sorted((i for i in range(size) if i not in stay), key=lambda i: (-wishes[i], i))[:count]
    given = [torch.tensor(kept), *(torch.tensor(values).float() for values in (sizes, wishes))]
    before = copy.deepcopy(given)
    new = drop_and_grow(*given, count)
    assert new.nonzero().flatten().tolist() == sorted([*stay, *come])
    assert all(map(torch.equal, given, before)) and int(new.sum()) == sum(kept)


@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_the_share_that_moves_falls_with_a_cosine(kind: str) -> None:
    method = MASKS[kind](sparsity=0.5, drop=0.3, until="100ba", every="10ba")
    mask = {"w": torch.arange(2000) < 1000}
    weights, grads = {"w": torch.arange(2000.0)}, {"w": torch.arange(2000.0)}
    for at in range(0, 101, 10):
        new = method.update(mask, weights, grads, Clock(at), torch.Generator())["w"]
        wanted = math.floor(0.15 * (1 + math.cos(math.pi * at / 100)) * 1000 + 1e-9)
        gone = mask["w"] & ~new
        assert not gone[wanted:].any()  # the smallest, of which some may have been drawn again
        assert int(gone.sum()) == wanted if kind == "rigl" else int(gone.sum()) <= wanted
        assert int(new.sum()) == 1000
        assert method.due(Clock(at)) == (0 < at < 100) and method.settled(Clock(at)) == (at == 100)
    assert not method.due(Clock(15))


def test_published_defaults() -> None:
    run = Clock(0, total_steps=1000)
    for kind in ("set", "rigl"):
        method = MASKS[kind](sparsity=0.9)
        assert (method.drop, method.allocation) == (0.3, "erk")
        assert [at for at in range(1001) if method.due(run.at(at))] == [100, 200, 300, 400, 500, 600, 700]
        assert method.settled(run.at(750)) and not method.settled(run.at(749))
    assert MASKS["dnw"](sparsity=0.9).allocation == MASKS["gradual"](sparsity=0.9).allocation == "erk"


# ---- the laws


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_the_laws_hold_after_every_step(case: str, optimizer: str) -> None:
    net = Digits()
    session, made = Session(net, recipe(case)), OPTIMIZERS[optimizer](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        first = old = session.mask
        assert list(old) == list(prunable(net))
        moved = []
        for i, batch in enumerate(BATCHES, 1):
            before, kept_state = weights_of(net), {n: state_of(made, p) for n, p in prunable(net).items()}
            kept_state = {name: [value.clone() for value in values] for name, values in kept_state.items()}
            step(net, made, batch)
            new, replaced = session.mask, case in ("set", "rigl") and i in MOVES[case]
            assert (new is old) == (i not in MOVES[case])
            for name, param in prunable(net).items():
                assert not param[~new[name]].any()
                if case not in HIDES or (case == "dnw_frozen" and i >= 5):
                    assert not any(bool(value[~new[name]].any()) for value in state_of(made, param))
                assert int(new[name].sum()) == int(first[name].sum()) or case in AFTER
                grown, gone = new[name] & ~old[name], old[name] & ~new[name]
                assert case in AFTER or int(grown.sum()) == int(gone.sum())
                assert case != "gradual" or not grown.any()
                if replaced:  # the update takes the place of the weights' own
                    assert torch.equal(param, before[name] * new[name])
                    assert all(map(torch.equal, state_of(made, param), [v * new[name] for v in kept_state[name]]))
                    assert not param[grown].any() and bool(gone.any()) == (not first[name].all())
            assert new.kept == first.kept or case in COUNTS
            others = [n for n, p in net.named_parameters() if n not in new and torch.equal(p, before[n])]
            assert bool(others) == replaced
            moved += [i] if new != old else []
            old = new
    assert set(moved) <= set(MOVES[case]) and len(moved) > 1
    # at its begin, gradual has nothing to cut; others may find nothing to change
    assert case in (*HIDES, "edge_popup") or moved == MOVES[case][case == "gradual" :]
    assert session.mask == old == Mask.from_zeros(prunable(net))


@pytest.mark.parametrize("case", CASES)
def test_counts_of_every_layer_are_exact_after_many_moves(case: str) -> None:
    """No drift, as drawing each weight with a probability has it."""
    net, often = Digits(), {"every": "1ba"} if "every" in MOVING[case] else {}
    session = Session(net, recipe({**MOVING[case], **often, **({"until": "60ba"} if "until" in MOVING[case] else {})}))
    made, size = OPTIMIZERS["sgd"](net.parameters()), sum(p.numel() for p in prunable(net).values())
    with session.drive(made, total_steps=60):
        first = {name: int(mask.sum()) for name, mask in session.mask.items()}
        assert sum(first.values()) == round({"gradual": 0.8, "ac_dc": 1}.get(case, 0.4) * size)
        for i in range(60):
            step(net, made, BATCHES[i % STEPS])
            if case == "ac_dc":
                assert session.mask.kept == (round(0.4 * size) if session.moving.sparse_at(session.clock) else size)
            elif case == "snfs":
                assert session.mask.kept == round(0.4 * size)
            elif case != "gradual":
                assert {name: int(mask.sum()) for name, mask in session.mask.items()} == first
            else:
                wanted = session.moving.sparsity_at(session.clock) if session.clock.step else 0.2
                assert session.mask.kept == round((1 - wanted) * size)
    assert session.mask.kept == round((0.2 if case == "gradual" else 0.4) * size)


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_history(case: str) -> None:
    first = history(case, seed=1)
    torch.rand(7)
    assert history(case, seed=1) == first
    assert (history(case, seed=2) == first) == (case not in DRAWN)


def test_set_moves_at_random() -> None:
    """A shuffle of masks that shuffles nothing would go unseen by all counts."""
    masks = history("set")
    grown = [(new - old)["body.7.weight"].flatten() for old, new in itertools.pairwise(masks) if new != old]
    assert len(grown) == 3 and all(int(each.sum()) > 20 for each in grown)
    assert [int((grown[0] & other).sum()) < int(other.sum()) / 2 for other in grown[1:]] == [True, True]
    places = [each.nonzero().flatten() for each in grown]
    assert all(int(p.min()) < 180 and int(p.max()) > 540 for p in places)  # over the whole layer, of 720
    other = history("set", seed=1)
    assert other[-1].overlap(masks[-1]) < 0.5


@pytest.mark.parametrize("kind", ["set", "selfish", "rigl"])
def test_gradients_say_nothing_to_a_mask_that_grows_at_random(kind: str) -> None:
    method: Any = MASKS[kind](sparsity=0.5, every="1ba", drop=0.5)
    mask, weight = {"w": torch.arange(40) < 20}, {"w": torch.linspace(2, 1, 40) * (torch.arange(40) < 20)}
    grown = [
        method.update(mask, weight, {"w": grad}, Clock(1, 10), torch.Generator().manual_seed(3))["w"]
        for grad in (torch.arange(40.0), torch.arange(40.0).flip(0))
    ]
    assert torch.equal(*grown) == (kind != "rigl")
    assert all(int(new.sum()) == 20 for new in grown) and not torch.equal(grown[0], mask["w"])


def test_grown_weights_start_at_zero_with_a_fresh_memory() -> None:
    """Also those that are regrown, and whose old value waits in a copy of somebody's."""
    for optimizer in OPTIMIZERS:
        net = Digits()
        session, made = Session(net, recipe("rigl")), OPTIMIZERS[optimizer](net.parameters())
        with session.drive(made, BATCHES, total_steps=STEPS):
            masks = [session.mask]
            for batch in BATCHES[:5]:
                for name, param in prunable(net).items():  # as code that knows of no mask may do
                    with torch.no_grad():
                        param[~session.mask[name]] = 7.0
                        for value in state_of(made, param):
                            value[~session.mask[name]] = 7.0
                step(net, made, batch)
                masks.append(session.mask)
            for name, param in prunable(net).items():
                grown = masks[5][name] & ~masks[4][name]
                assert bool(grown.any()) == (not masks[5][name].all()) and not param[grown].any()
                assert not any(bool(value[grown].any()) for value in state_of(made, param))


def frozen_copy(*states: Any) -> list[Any]:
    """As from a file that is loaded without unpickling code."""
    buffer = io.BytesIO()
    torch.save(list(states), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@functools.cache
def reference(case: str, optimizer: str) -> tuple[dict[str, Tensor], list[dict[str, float]], list[list[Any]]]:
    """The weights at the end, the metrics after each step, and a checkpoint at the start and after each step."""
    net = Digits()
    session, made = Session(net, recipe(case)).attach(), OPTIMIZERS[optimizer](net.parameters())
    metrics, saved = [], []
    with session.drive(made, BATCHES, total_steps=STEPS):
        saved.append(frozen_copy(net.state_dict(), made.state_dict(), session.state_dict()))
        for batch in BATCHES:
            step(net, made, batch)
            metrics.append(session.metrics())
            saved.append(frozen_copy(net.state_dict(), made.state_dict(), session.state_dict()))
    return weights_of(net), metrics, saved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", range(STEPS + 1))
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_bit_for_bit_from_any_step(case: str, stop: int, optimizer: str) -> None:
    wanted, metrics, saved = reference(case, optimizer)
    net, saved = Digits(), copy.deepcopy(saved[stop])
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.1)
    session, made = Session(net, recipe(case)).attach(), OPTIMIZERS[optimizer](net.parameters())
    inside = stop % 2  # load before the start, or after it

    def load() -> None:
        for part, state in zip((net, made, session), saved, strict=True):
            part.load_state_dict(state)

    if not inside:
        load()
    with session.drive(made, BATCHES, total_steps=STEPS):
        if inside:
            load()
        for i in range(stop, STEPS):
            step(net, made, BATCHES[i])
            assert session.metrics() == metrics[i]
    assert equal(weights_of(net), wanted)


@pytest.mark.parametrize("case", CASES)
def test_an_older_checkpoint_takes_the_mask_back(case: str) -> None:
    wanted, metrics, saved = reference(case, "sgd")
    net = Digits()
    session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        for batch in BATCHES[:9]:
            step(net, made, batch)
        net.load_state_dict(saved[2][0])
        made.load_state_dict(copy.deepcopy(saved[2][1]))
        assert session.clock.step == 2 and session.metrics() == metrics[1]
        for batch in BATCHES[2:]:
            step(net, made, batch)
    assert equal(weights_of(net), wanted)


@pytest.mark.parametrize("case", CASES)
def test_copies_of_a_running_model_stand_alone(case: str) -> None:
    net, x = Digits(), BATCHES[0][0]
    session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        for batch in BATCHES[:4]:
            step(net, made, batch)
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        before = weights_of(net)
        assert all(equal(weights_of(twin), before) for twin in twins)
        for batch in BATCHES[4:6]:
            step(net, made, batch)
        assert all(equal(weights_of(twin), before) for twin in twins) and not equal(weights_of(net), before)
        assert torch.isfinite(twins[0](x)).all()


@pytest.mark.parametrize("case", CASES)
def test_a_finished_model_is_the_plain_network(case: str) -> None:
    net, plain = Digits(), Digits()
    ids = {name: id(param) for name, param in net.named_parameters()}
    attributes = {path: set(vars(module)) for path, module in plain.named_modules()}
    session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        for batch in BATCHES:
            step(net, made, batch)
        running = copy.deepcopy(net).eval()(BATCHES[0][0])
    assert list(net.state_dict()) == list(plain.state_dict())
    assert {path: set(vars(module)) for path, module in net.named_modules()} == attributes
    assert {name: id(param) for name, param in net.named_parameters()} == ids
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain.eval()(BATCHES[0][0]), running)
    assert session.mask == Mask.from_zeros(prunable(net))
    step(net, made, BATCHES[0])  # it is nobody's any more
    assert len(session.mask) == 3


# ---- what comes between a gradient and a step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_closures_change_nothing(case: str, optimizer: str) -> None:
    wanted, net = history(case, optimizer), Digits()
    session, made = Session(net, recipe(case)), OPTIMIZERS[optimizer](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        found = [session.mask]
        for x, y in BATCHES:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                made.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            assert made.step(closure).ndim == 0
            found.append(session.mask)
    assert found == wanted


def lbfgs(case: str) -> list[Mask]:
    net, found = Digits(norm=False), []
    session, made = Session(net, recipe(case)), torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
    with session.drive(made, BATCHES, total_steps=STEPS):
        for i, (x, y) in enumerate(BATCHES, 1):
            calls = []

            def closure(x: Tensor = x, y: Tensor = y, calls: list = calls) -> Tensor:
                calls.append(1)
                made.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            before = weights_of(net)
            made.step(closure)
            after = case in AFTER
            assert (len(calls) > 1) == (after or i not in MOVES[case]) and session.clock.step == i
            assert not any(bool(p[~session.mask[name]].any()) for name, p in prunable(net).items())
            if not after and i in MOVES[case]:
                assert all(torch.equal(p, before[n] * session.mask[n]) for n, p in prunable(net).items())
            found.append(session.mask)
    return found


@pytest.mark.parametrize("case", ["set", "rigl", *AFTER])
def test_lbfgs_moves_a_mask_once_in_a_step(case: str) -> None:
    masks = lbfgs(case)
    assert [i for i in range(2, STEPS + 1) if masks[i - 1] != masks[i - 2]] == [i for i in MOVES[case] if i > 1]


@pytest.mark.parametrize("case", ["dnw", "top_kast"])
def test_lbfgs_cannot_train_hidden_weights(case: str) -> None:
    message = (
        rf"mask {case}: expected one gradient for each step, got a second one while all weights are in the network \(SAM and "
        r"LBFGS take several\); use another optimizer, or a mask that does not hide"
    )
    with pytest.raises(TostError, match=message):
        lbfgs(case)


def test_an_interrupted_step_leaves_a_sparse_network_that_goes_on() -> None:
    """Whatever the optimizer had got done: hidden weights are out of sight, and not lost."""

    class Pressed(torch.optim.SGD):
        press = False

        def step(self, closure: Any = None) -> Any:
            if self.press:
                raise KeyboardInterrupt
            return super().step(closure)

    net = Digits(norm=False)
    session = Session(net, recipe("dnw"))
    made = Pressed(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), session.drive(made, BATCHES, total_steps=STEPS):
            made.press = False
            step(net, made, BATCHES[0])
            before, made.press = weights_of(net), True
            assert before["body.7.weight_hidden"].any()
            step(net, made, BATCHES[1])
        assert equal(weights_of(net), before)
    assert session.clock.step == 2


def test_an_optimizer_whose_step_calls_its_parents_makes_one_step() -> None:
    """Torch runs the hooks twice once the parent class has been used by itself."""

    class Child(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD(Digits().parameters(), lr=0.1)
    for case in CASES:
        net, found = Digits(), []
        session = Session(net, recipe(case))
        made = Child(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        with session.drive(made, BATCHES, total_steps=STEPS):
            for batch in BATCHES:
                step(net, made, batch)
                found.append(session.mask)
        assert found == history(case)[1:]


def test_an_optimizer_that_calls_its_closure_twice_moves_the_mask_once() -> None:
    class Twice(Optimizer):
        def step(self, closure: Any) -> None:
            closure(), closure()
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.data -= param.grad

    net, changed = Row(KEPT), []
    session = Session(net, recipe({"kind": "rigl", **DROPS}), Mask({"row.weight": bits("11110000")}))
    made = Twice(net.parameters(), {})
    with session.drive(made, total_steps=10):
        for gradient, after, mask in RIGL:

            def closure(gradient: list[float] = gradient) -> Tensor:
                made.zero_grad()
                loss = net(torch.tensor([gradient]).float()).sum()
                loss.backward()
                return loss

            made.step(closure)
            changed.append(session.metrics()["tost/mask/changed"])
            assert net.row.weight.tolist() == [after] and torch.equal(session.mask["row.weight"], bits(mask))
    assert changed == [0, 0, 4, 4, 2, 2]


@pytest.mark.parametrize("case", CASES)
def test_accumulation_counts_optimizer_steps(case: str) -> None:
    """In float64 and without norms, parts of a batch give the gradient of the whole."""
    whole, parts = (moving_cases.history(case, Digits(norm=False).double(), parts=parts) for parts in (1, 4))
    assert whole[0] == parts[0]
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[1][name], value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_neither_shifts_nor_repeats_a_move(case: str, fused: bool) -> None:
    """A loss scaler skips some steps, with those that move the mask among them: the rest is as without them."""
    found = []
    for overflows in ([], [0, 2, 3, 5]):
        net, masks = Digits(norm=False), []
        session = Session(net, recipe(case))
        made = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        with session.drive(made, total_steps=STEPS):
            for i, (x, y) in enumerate(BATCHES):
                for factor in [float("inf"), 1.0] if i in overflows else [1.0]:
                    made.zero_grad()
                    scaler.scale(factor * F.cross_entropy(net(x), y)).backward()
                    before, mask = weights_of(net), session.mask
                    scaler.step(made)
                    scaler.update()
                    if factor != 1:
                        assert session.mask is mask and session.clock.step == i and equal(weights_of(net), before)
                masks.append(session.mask)
                assert session.clock.step == i + 1
        found.append((masks, weights_of(net)))
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_a_scaler_skips_in_the_order_of_trainers(case: str) -> None:
    """Composer and the Trainer unscale, tell the session, step, and count also the steps that the scaler skips."""
    net, masks = Digits(norm=False), []
    session, made = Session(net, recipe(case)).attach(), OPTIMIZERS["sgd"](net.parameters())
    session.start(made, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(BATCHES, 1):
        made.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y) * (float("inf") if i in (3, 4) else 1.0)).backward()
        before = weights_of(net)
        scaler.unscale_(made)
        session.before_step(check_finite=False)
        scaler.step(made)
        scaler.update()
        session.after_step(i)
        masks.append(session.mask)
        assert not any(bool(p[~masks[-1][name]].any()) for name, p in prunable(net).items())
        if i in (3, 4) and case not in AFTER:
            assert masks[-1] == masks[-2]
            assert all(torch.equal(value, before[n]) for n, value in net.named_parameters())
    if case in ("set", "rigl"):  # the move of the third step is lost with it, the others come when they are due
        assert [i for i in range(2, STEPS + 1) if masks[i - 1] != masks[i - 2]] == [5, 7]
    session.finish()


def test_what_an_optimizer_counts_in_whole_numbers_is_left_alone() -> None:
    class Counting(Optimizer):
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["age"] = state.get("age", torch.zeros_like(param, dtype=torch.uint8)) + 1
                    param.data -= 0.05 * param.grad

    for case in CASES:
        net = Digits()
        session, made = Session(net, recipe(case)), Counting(net.parameters(), {})
        with session.drive(made, BATCHES, total_steps=STEPS):
            for batch in BATCHES:
                step(net, made, batch)
        moves = 3 if case in ("set", "rigl") else 0
        shown = {id(p): 1 for p in prunable(net).values()} if case == "edge_popup" else {}  # its weights are seen once
        for param, state in made.state.items():
            assert bool((state["age"] == shown.get(id(param), STEPS - moves)).all())


def test_gradients_that_are_not_finite_stop_the_run_before_the_mask_moves() -> None:
    for kind in ("rigl", "dnw"):
        with row(TABLES[kind][0], TABLES[kind][1]) as go:
            go(RIGL[0][0]), go(RIGL[1][0])
            before, mask = weights_of(go.net), go.session.mask
            with pytest.raises(TostError, match=r"step 2: expected finite gradients, got NaN or Inf in row\.weight"):
                go([float("nan")] * 8)
            assert equal(weights_of(go.net), before) and go.session.mask is mask
            assert go([0.0] * 8).clock.step == 3  # and it can go on
            assert not go.net.row.weight[~go.session.mask["row.weight"]].any()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_moves_alike_and_compiles_once(case: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, found = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        net = Digits().double()
        session = Session(net, recipe(case)).attach()
        run = torch.compile(net, backend=counter, fullgraph=True) if compiled else net
        made, masks = OPTIMIZERS["sgd"](net.parameters()), []
        with session.drive(made, total_steps=STEPS):
            for x, y in BATCHES:
                step(run, made, (x.double(), y))
                masks.append(session.mask)
        found.append(masks)
    torch._dynamo.reset()
    assert found[0] == found[1] and counter.frame_count == 1


TWEAKS = [
    {"kind": "ghost_skip", "until": "4ba"},
    {"kind": "soft_activation", "until": "7ba"},
    {"kind": "rescaled_init", "iterations": 2},
    {"kind": "label_smoothing"},
]


@pytest.mark.parametrize("case", CASES)
def test_all_tweaks_on_top(case: str) -> None:
    net, plain = Digits(), Digits()
    session, made = Session(net, recipe(case, tweaks=TWEAKS)), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, F.cross_entropy, total_steps=STEPS):
        loss_fn, masks = session.criterion(F.cross_entropy), []
        for x, y in BATCHES:
            made.zero_grad()
            loss_fn(net(x), y).backward()
            made.step()
            masks.append(session.mask)
            assert not any(bool(p[~masks[-1][name]].any()) for name, p in prunable(net).items())
    assert len({id(mask) for mask in masks}) > 2 and masks[0] != masks[-1]
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert session.report().ghost_parameters == 0 and session.mask == Mask.from_zeros(prunable(net))


def test_rescaled_init_before_dnw_sees_the_sparse_network() -> None:
    """Hidden weights are scaled with their tensor, and the scales are those of the same mask that stays."""
    found = []
    for case in ({"kind": "dnw", "sparsity": 0.6}, {"kind": "magnitude", "sparsity": 0.6, "allocation": "erk"}):
        net = Digits()
        session = Session(net, recipe(case, tweaks=TWEAKS[2:3])).attach()
        session.start(OPTIMIZERS["sgd"](net.parameters()), BATCHES, loss_fn=F.cross_entropy, total_steps=STEPS)
        found.append(net)
    dnw, magnitude = found
    assert all(torch.equal(a, b) for a, b in zip(dnw.parameters(), magnitude.parameters(), strict=True))
    scale = dnw.body[7].weight.abs().sum() / (Digits().body[7].weight * dnw.body[7].weight_mask).abs().sum()
    whole = dnw.body[7].weight + dnw.body[7].weight_hidden
    torch.testing.assert_close(whole, Digits().body[7].weight * scale)


# ---- where it starts, and where it ends


@pytest.mark.parametrize("case", CASES)
def test_a_given_mask_is_the_first_one(case: str) -> None:
    net, generator = Digits(), torch.Generator().manual_seed(4)
    mask = Mask({name: torch.rand(p.shape, generator=generator) < 0.7 for name, p in prunable(net).items()})
    session, made = Session(net, recipe(case), mask), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        assert session.mask == mask and mask == Mask.from_zeros(prunable(net))
        for batch in BATCHES:
            step(net, made, batch)
    if case == "ac_dc":
        assert session.mask.sparsity == pytest.approx(0.6, abs=1e-3)
    elif case == "gradual":
        assert session.mask.sparsity == pytest.approx(0.8, abs=1e-3)
        assert all(not bool((new & ~mask[name]).any()) for name, new in session.mask.items())
    else:  # its counts are kept, not the recipe's sparsity
        assert session.mask.kept == mask.kept
        assert case == "snfs" or {n: int(m.sum()) for n, m in session.mask.items()} == {
            n: int(m.sum()) for n, m in mask.items()
        }
        assert session.mask != mask


def test_gradual_leaves_a_given_mask_that_is_sparser_alone_until_its_turn() -> None:
    net, generator = Digits(), torch.Generator().manual_seed(4)
    mask = Mask({name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in prunable(net).items()})
    session, made = Session(net, recipe("gradual"), mask), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        for batch in BATCHES[:3]:  # it asks for 0.58 at most
            step(net, made, batch)
            assert session.mask == mask
        for batch in BATCHES[3:]:
            step(net, made, batch)
    assert session.mask.sparsity == pytest.approx(0.8, abs=1e-3)


def test_dnw_that_is_frozen_at_the_start_is_a_static_mask() -> None:
    masks = history({"kind": "dnw", "sparsity": 0.6, "freeze": "0ba"})
    assert all(mask is masks[0] for mask in masks[:-1])
    assert masks == history({"kind": "magnitude", "sparsity": 0.6, "allocation": "erk"})


def test_gradual_that_ends_at_the_start_cuts_there() -> None:
    masks = history({"kind": "gradual", "sparsity": 0.75, "until": "0ba"})
    assert all(mask is masks[0] for mask in masks[:-1])
    assert masks == history({"kind": "magnitude", "sparsity": 0.75, "allocation": "erk"})


def test_the_curve_of_gradual() -> None:
    method = MASKS["gradual"](sparsity=0.9, initial=0.1, begin="10ba", until="50ba", every="10ba")
    points = [(0, 0.1), (10, 0.1), (20, 0.9 - 0.8 * 0.75**3), (30, 0.8), (50, 0.9), (99, 0.9)]
    for at, wanted in points:
        assert method.sparsity_at(Clock(at)) == pytest.approx(wanted)
    assert [at for at in range(100) if method.due(Clock(at))] == [10, 20, 30, 40, 50]
    uneven = MASKS["gradual"](sparsity=0.9, begin="10ba", until="45ba", every="10ba")
    assert [at for at in range(100) if uneven.due(Clock(at))] == [10, 20, 30, 40, 45]
    jump = MASKS["gradual"](sparsity=0.9, begin="10ba", until="10ba")
    assert [jump.sparsity_at(Clock(at)) for at in (0, 9, 10)] == [0, 0, 0.9]
    assert [at for at in range(100) if jump.due(Clock(at))] == [10]


def test_no_layer_of_gradual_gets_a_weight_back_where_shares_are_rounded() -> None:
    """Fewer kept in all can mean more in one: that one goes on with what it has."""
    shapes = {name: (size,) for name, size in PARADOX.items()}
    more, fewer = (allocate("uniform", shapes, sparsity) for sparsity in FALL)
    assert more is not None and fewer is not None and any(fewer[name] > more[name] for name in shapes)
    weights = {name: torch.arange(1.0, size + 1) for name, size in PARADOX.items()}
    method = MASKS["gradual"](sparsity=FALL[1], until="4ba", allocation="uniform")
    mask = {name: value >= len(value) - more[name] + 1 for name, value in weights.items()}
    new = method.update(mask, weights, {}, Clock(4), torch.Generator())
    assert all(not bool((new[name] & ~mask[name]).any()) for name in mask)
    assert sum(int(kept.sum()) for kept in new.values()) == sum(fewer.values()) < sum(more.values())


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk", {"body.0": 0.0}])
def test_removed_weights_of_gradual_never_come_back(allocation: Any) -> None:
    masks = history({**MOVING["gradual"], "initial": 0.0, "every": "1ba", "allocation": allocation})
    for old, new in itertools.pairwise(masks):
        assert all(not bool((mask & ~old[name]).any()) for name, mask in new.items())
    assert masks[-1].kept == round(0.2 * masks[-1].size)


def test_gradual_may_keep_one_weight_of_a_layer(caplog: pytest.LogCaptureFixture) -> None:
    net, method = Digits(norm=False), {**MOVING["gradual"], "allocation": "global"}
    with torch.no_grad():
        net.body[0].weight *= 1e-3
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        masks = history({**method, "initial": 0.0}, net=copy.deepcopy(net))
    assert masks[-1]["body.0.weight"].any() and masks[-1].kept > round(0.2 * masks[-1].size)  # the last that connects
    (line,) = [r.getMessage() for r in caplog.records if "a move is left out" in r.getMessage()]
    assert line.endswith("would leave no path from the inputs to the outputs: the last one ends at body.0.weight")
    masks = history({**method, "on_collapse": "keep_one"}, net=net)
    assert int(masks[-1]["body.0.weight"].sum()) == 1 and masks[-1].kept == round(0.2 * masks[-1].size)
    assert "keep one each" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_finishing_before_the_mask_has_come_to_its_end_says_so(case: str, caplog: pytest.LogCaptureFixture) -> None:
    middle = 3 if case == "snfs" else 4  # after 4 steps some have just grown, and are 0 still
    for steps in (middle, STEPS):
        caplog.clear()
        net = Digits()
        session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
        with caplog.at_level(logging.WARNING, logger="tost_plugins"), session.drive(made, total_steps=STEPS):
            for batch in BATCHES[:steps]:
                step(net, made, batch)
        told = [r.getMessage() for r in caplog.records if "before the schedules ended" in r.getMessage()]
        assert bool(told) == (steps == middle and case not in HIDES)
        assert session.mask == Mask.from_zeros(prunable(net))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_middle_is_exported_as_the_plain_network(case: str, tmp_path: Path) -> None:
    net, plain = Digits(), Digits()
    session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
    with session.drive(made, BATCHES, total_steps=STEPS):
        for batch in BATCHES[: 3 if case == "snfs" else 4]:  # after 4 steps some have just grown, and are 0 still
            step(net, made, batch)
        torch.save(net.state_dict(), tmp_path / "last.pt")
        wanted, mask = copy.deepcopy(net).eval()(BATCHES[0][0]), session.mask
    found = export(tmp_path / "last.pt", tmp_path / "plain.safetensors")
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=True)
    assert torch.equal(plain.eval()(BATCHES[0][0]), wanted)
    assert found["sparsity"] == pytest.approx(mask.sparsity) and Mask.from_zeros(prunable(plain)) == mask
    assert Mask.load(tmp_path / "last.pt") == mask


def test_weights_of_a_plain_network_load_into_a_running_one() -> None:
    for case in CASES:
        net, plain = Digits(), Digits()
        session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
        with session.drive(made, BATCHES, total_steps=STEPS):
            step(net, made, BATCHES[0])
            mask = session.mask
            net.load_state_dict(plain.state_dict(), strict=True)
            assert session.mask == mask and session.clock.step == 1
            step(net, made, BATCHES[1])
            assert not any(bool(p[~session.mask[name]].any()) for name, p in prunable(net).items())


def test_layers_in_other_dtypes_move_alike() -> None:
    masks = history("rigl", net=Digits(norm=False))
    assert history("rigl", net=Digits(norm=False))[-1] == masks[-1]
    for case in CASES:
        net = Digits(norm=False).bfloat16()
        session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
        with session.drive(made, total_steps=STEPS):
            for x, y in BATCHES:
                step(net, made, (x.bfloat16(), y))
            kept = session.mask.kept
        assert kept == round((0.2 if case == "gradual" else 0.4) * session.mask.size)


@pytest.mark.parametrize("case", CASES)
def test_a_model_moved_to_another_dtype_goes_on(case: str) -> None:
    net = Digits(norm=False)
    session, made = Session(net, recipe(case)), torch.optim.SGD(net.parameters(), lr=0.05)
    with session.drive(made, total_steps=STEPS):
        step(net, made, BATCHES[0])
        net.double()
        for x, y in BATCHES[1:3]:
            step(net, made, (x.double(), y))
        if case in HIDES:
            name, param = "body.7.weight", net.body[7].weight
            hidden = net.state_dict()[f"{name}_hidden"]
            assert hidden.dtype == torch.float64 and torch.equal(hidden != 0, ~session.mask[name])
            before = hidden + param.detach()
            x, y = BATCHES[3][0].double(), BATCHES[3][1]
            step(net, made, (x, y))
            now = net.state_dict()[f"{name}_hidden"] + param.detach()
            torch.testing.assert_close(now, before - 0.05 * param.grad)


# ---- errors


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"kind": "dnw", "sparsity": 0.5, "allocation": "global"},
            r"mask\.allocation: expected a share for each layer, got 'global'; use uniform, er, erk or a map",
        ),
        (
            {"kind": "gradual", "sparsity": 0.5, "initial": 0.6},
            r"mask: expected initial of at most sparsity, 0\.5, got 0\.6; lower initial",
        ),
        (
            {"kind": "gradual", "sparsity": 0.5, "begin": "0.6dur"},
            r"mask: expected begin before until, 0\.5dur, got 0\.6dur; begin earlier",
        ),
        ({"kind": "rigl", "sparsity": 0.5, "drop": 0}, r"mask\.drop: expected greater than 0, got 0"),
        ({"kind": "set", "sparsity": 0.5, "every": 100}, r"mask\.every: .*expected a number with a unit, got 100"),
        ({"kind": "rigl", "sparsity": 0.5, "growth": "random"}, r"mask\.growth: expected no such key"),
        ({"kind": "rig", "sparsity": 0.5}, "expected a known mask method, got 'rig'; did you mean 'rigl'"),
    ],
)
def test_wrong_options_are_errors_that_say_where(mask: dict[str, Any], message: str) -> None:
    with pytest.raises(TostError, match=message):
        Session(Digits(), recipe(mask))


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        ({"kind": "rigl", "sparsity": 0.5, "until": "2ep"}, "rigl.until: time '2ep'"),
        ({"kind": "set", "sparsity": 0.5, "every": "1ep"}, "set.every: time '1ep'"),
        ({"kind": "dnw", "sparsity": 0.5, "freeze": "1ep"}, "dnw.freeze: time '1ep'"),
        ({"kind": "gradual", "sparsity": 0.5, "begin": "0.5ep"}, "gradual.begin: time '0.5ep'"),
    ],
)
def test_epochs_of_unknown_length_are_an_error_at_the_start(mask: dict[str, Any], name: str) -> None:
    net = Digits()
    session, before = Session(net, recipe(mask)).attach(), weights_of(net)
    made = OPTIMIZERS["sgd"](net.parameters())
    with pytest.raises(TostError, match=f"^{name}: expected a run of known length, got steps_per_epoch=None; pass"):
        session.start(made, total_steps=STEPS)
    assert equal({n: t for n, t in weights_of(net).items() if n in before}, before) and session.state == "attached"
    session.start(made, total_steps=STEPS, steps_per_epoch=5)


def test_rigl_wants_a_gradient_for_every_layer() -> None:
    net = Digits()
    net.unused = torch.nn.Linear(4, 4)
    session, made = Session(net, recipe("rigl")), OPTIMIZERS["sgd"](net.parameters())
    message = (
        r"rigl: expected a gradient for unused\.weight, got none; add 'unused' to `ignore` if it is frozen or not used"
    )
    with pytest.raises(TostError, match=message), session.drive(made, total_steps=STEPS):
        for batch in BATCHES:
            mask = session.mask
            step(net, made, batch)
    assert session.mask is mask and session.clock.step == 2


def test_rigl_leaves_a_frozen_layer_alone() -> None:
    net = Digits()
    net.body[3].weight.requires_grad_(False)
    assert "body.3.weight" not in history(MOVING["rigl"], net=net)[-1]


@pytest.mark.parametrize("case", ["set", "rigl", "dnw", "top_kast", *AFTER])
def test_a_layer_that_is_frozen_in_mid_run_keeps_its_mask(case: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Digits()
    session, made = Session(net, recipe(case)), OPTIMIZERS["sgd"](net.parameters())
    with caplog.at_level("INFO", "tost_plugins"), session.drive(made, total_steps=STEPS):
        for number, batch in enumerate(BATCHES):
            if number == 1:
                net.body[3].weight.requires_grad_(False)
                frozen, mask, others = net.body[3].weight.clone(), session.mask["body.3.weight"], dict(session.mask)
            step(net, made, batch)
    assert torch.equal(session.mask["body.3.weight"], mask)
    if case not in HIDES:  # whose hidden weights come and go
        assert torch.equal(net.body[3].weight, frozen)
    assert any(not torch.equal(kept, others[name]) for name, kept in session.mask.items())
    (line,) = [r.getMessage() for r in caplog.records if "do not train when it moves" in r.getMessage()]
    assert "body.3.weight" in line


def test_an_allocation_that_gradual_cannot_end_with_is_an_error_at_the_start() -> None:
    with pytest.raises(TostError, match=r"^mask gradual: allocation: expected"):
        history({"kind": "gradual", "sparsity": 0.8, "allocation": {"body.7": 0.0}})


# ---- what it costs


class Calls(TorchDispatchMode):
    """The names of all that torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_costs_as_much_as_with_a_static_mask_where_the_mask_does_not_move() -> None:
    found = {}
    for case in ("rigl", "dnw_frozen", "gradual", "ac_dc", "dnw"):
        for mask in (MOVING[case], {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}):
            net = Digits()
            session, made = Session(net, recipe(mask)).attach(), OPTIMIZERS["sgd"](net.parameters())
            session.start(made, total_steps=STEPS)
            for batch in BATCHES[:6]:  # the seventh moves the masks of RigL and gradual: look at the sixth
                made.zero_grad()
                F.cross_entropy(net(batch[0]), batch[1]).backward()
                with Calls() as calls:
                    session.before_step()
                    made.step()
                    session.after_step()
                    session.metrics()
            found[case, mask["kind"]] = calls.names
    for case in ("rigl", "dnw_frozen", "gradual", "ac_dc"):
        assert found[case, MOVING[case]["kind"]] == found[case, "random"]
    assert len(found["dnw", "dnw"]) > len(found["dnw", "random"])


# ---- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have found."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, str(here / "ranks/moving_ddp.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_hold_the_masks_of_one_rank_with_the_whole_batch(ranks: Any, case: str, parts: int) -> None:
    masks, weights = moving_cases.history(case, Digits(norm=False).double())
    for found in ranks:
        found = found[f"{case} in {parts}"]
        assert [Mask(mask) for mask in found["masks"]] == masks
        for name, value in weights.items():
            torch.testing.assert_close(found["weights"][name], value)
    assert equal(ranks[0][f"{case} in {parts}"]["weights"], ranks[1][f"{case} in {parts}"]["weights"])


def test_the_gradient_of_one_rank_alone_would_grow_other_weights(ranks: Any) -> None:
    wanted = Mask(ranks[0]["rigl in 1"]["masks"][2])
    local = [Mask(found["local"]) for found in ranks]
    assert len({mask.kept for mask in (wanted, *local)}) == 1
    assert local[0] != local[1] and wanted not in local
