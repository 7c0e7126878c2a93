"""edge_popup: what scores learn, by hand and beside a restatement with autograd; and that no weight ever moves."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import refused
from moving_cases import STEPS, Digits, digits
from torch import Tensor, nn

from tost_plugins import Mask, Recipe, Session
from tost_plugins.masks import MASKS, find
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable

SPEC: dict[str, Any] = {"kind": "edge_popup", "sparsity": 0.5}


class Careless(torch.optim.Optimizer):
    """Moves every parameter, with a gradient or without."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.data.mul_(0.9).add_(0.2)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)


def train(net: nn.Module, session: Session, optimizer: torch.optim.Optimizer) -> None:
    for x, y in digits(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


# ---- what scores learn


class Row(nn.Module):
    """Four weights; the derivative of the output by them is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(4, 1, bias=False)
        self.row.weight.data[0] = torch.tensor([1.0, -2.0, 3.0, -4.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x)


def test_scores_by_hand() -> None:
    net = Row()
    method = {**SPEC, "weights": "own", "learning_rate": 0.5, "momentum": 0.5, "weight_decay": 0, "until": "2ba"}
    session = Session(net, {"mask": method}, Mask({"row.weight": torch.tensor([[0, 0, 1, 1]])}))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with session.drive(optimizer, total_steps=4):
        drawn = net.row.weight_scores.clone()
        assert (drawn[0, :2] < 0).all() and (drawn[0, 2:] > 0).all() and drawn.abs().max() < 1 / math.sqrt(4)
        net.row.weight_scores.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        for gradient, scores, weights in [
            # gradient times weight is 2, 2, -6, 0: half of it at a rate of 1/2, whether the weight is kept or not
            ([2.0, -1.0, -2.0, 0.0], [3.0, 2.0, 5.0, 1.0], [1.0, 0.0, 3.0, 0.0]),
            # 0, 0, 0, -8; momenta 1, 1, -3, 0 - 8; the rate has fallen to 1/4, and ends there
            ([0.0, 0.0, 0.0, 2.0], [2.75, 1.75, 5.75, 3.0], [0.0, 0.0, 3.0, -4.0]),
            ([9.0, -9.0, 9.0, 9.0], [2.75, 1.75, 5.75, 3.0], [0.0, 0.0, 3.0, -4.0]),
        ]:
            optimizer.zero_grad()
            net(torch.tensor([gradient])).sum().backward()
            optimizer.step()
            torch.testing.assert_close(net.row.weight_scores, torch.tensor([scores]))
            assert net.row.weight.tolist() == [weights]


def restated(
    net: nn.Module, masks: Mask, values: dict[str, Tensor], first: dict[str, Tensor], method: Any
) -> list[Mask]:
    """Edge-popup with autograd: w h(s), where h passes gradients straight through, and torch's own SGD on s."""
    scores = {name: nn.Parameter(score.clone()) for name, score in first.items()}
    others = {name: param for name, param in net.named_parameters() if name not in scores}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    train_scores = torch.optim.SGD(scores.values(), lr=1, momentum=method.momentum, weight_decay=method.weight_decay)
    train_others, found = torch.optim.SGD(others.values(), lr=0.05, momentum=0.9), []

    def chosen(name: str) -> Tensor:
        flat = scores[name].detach().flatten()
        return torch.zeros_like(flat).index_fill(0, flat.topk(counts[name]).indices, 1).view_as(scores[name])

    for step, (x, y) in enumerate(digits(STEPS)):
        rate = method.learning_rate * (1 + math.cos(math.pi * min(1, step / 8))) / 2
        train_scores.param_groups[0]["lr"] = rate
        through = {name: chosen(name) + score - score.detach() for name, score in scores.items()}
        weights = {name: values[name] * h for name, h in through.items()}
        train_scores.zero_grad()
        train_others.zero_grad()
        F.cross_entropy(torch.func.functional_call(net, {**others, **weights}, x.double()), y).backward()
        if step < 8:
            train_scores.step()
        train_others.step()
        found.append(Mask({name: chosen(name).bool() for name in scores}))
    return found


@pytest.mark.parametrize("weights", ["signed_constant", "own"])
def test_a_run_is_the_restated_one(weights: str) -> None:
    net, other = Digits(norm=False).double(), Digits(norm=False).double()
    spec = {**SPEC, "weights": weights, "until": "8ba", "learning_rate": 0.5, "weight_decay": 0.01}
    session, found = Session(net, {"mask": spec}), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with session.drive(optimizer, total_steps=STEPS):
        at = {name: name.removesuffix("weight") for name in session.mask}
        first, values = (
            {name: net.get_buffer(f"{path}weight_{which}").clone() for name, path in at.items()}
            for which in ("scores", "fixed")
        )
        assert find(other, "edge_popup", 0.5) == session.mask
        wanted = restated(other, session.mask, values, first, session.moving)
        for x, y in digits(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
            found.append(session.mask)
    assert found == wanted and len({mask["body.7.weight"].sum().item() for mask in found}) == 1
    assert sum(a != b for a, b in itertools.pairwise(found)) > 3
    mine, theirs = dict(net.named_parameters()), dict(other.named_parameters())
    for name in mine.keys() - session.mask.keys():
        torch.testing.assert_close(mine[name], theirs[name])


# ---- no weight moves


@pytest.mark.parametrize("weights", ["signed_constant", "own"])
@pytest.mark.parametrize("make", [sgd, adamw, Careless])
def test_kept_weights_are_bit_equal_at_the_end(make: Any, weights: str) -> None:
    net = Digits()
    session = Session(net, {"mask": {**SPEC, "weights": weights}}).attach()
    optimizer = make(net.parameters())
    start = {name: param.detach().clone() for name, param in net.named_parameters()}
    masks = prunable(net).keys()
    with session.drive(optimizer, total_steps=STEPS):
        first = session.mask
        train(net, session, optimizer)
        assert session.mask != first
    for name, param in net.named_parameters():
        if name not in masks:
            assert not torch.equal(param, start[name])  # norms and biases train
            continue
        keep = session.mask[name]
        assert not param[~keep].any() and torch.equal(param[keep].sign(), start[name][keep].sign())
        if weights == "own":
            assert torch.equal(param[keep], start[name][keep])
        else:
            inputs, share = param[0].numel(), int(first[name].sum()) / param.numel()
            assert param[keep].abs().unique().tolist() == pytest.approx([math.sqrt(2 / (share * inputs))])


def test_the_optimizer_is_shown_no_weights() -> None:
    net = Digits()
    session = Session(net, {"mask": SPEC})
    optimizer, seen = adamw(net.parameters()), []
    with session.drive(optimizer, total_steps=STEPS):
        optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad for p in prunable(net).values()]))
        train(net, session, optimizer)
    assert len(seen) == STEPS and not any(grad.any() for grad in seen[0])  # zeros once, so that it has a state to save
    assert all(grad is None for grads in seen[1:] for grad in grads)
    for param in prunable(net).values():
        assert not optimizer.state[param]["exp_avg"].any() and not optimizer.state[param]["exp_avg_sq"].any()


def test_layers_to_ignore_train_as_usual() -> None:
    net = Digits()
    before = net.body[7].weight.detach().clone()
    session = Session(net, {"mask": {**SPEC, "ignore": ["body.7"]}})
    optimizer = sgd(net.parameters())
    with session.drive(optimizer, total_steps=STEPS):
        train(net, session, optimizer)
    assert bool((net.body[7].weight != before).all()) and list(session.mask) == ["body.0.weight", "body.3.weight"]


def test_weights_that_are_loaded_in_mid_run_are_those_of_the_rest() -> None:
    net, plain = Digits(), Digits()
    session, optimizer = Session(net, {"mask": SPEC}), sgd(net.parameters())
    with torch.no_grad():
        for param in plain.parameters():
            param.add_(1)
    with session.drive(optimizer, total_steps=2 * STEPS):
        train(net, session, optimizer)
        net.load_state_dict(plain.state_dict())
        train(net, session, optimizer)
    for name, keep in session.mask.items():
        assert torch.equal(net.get_parameter(name), plain.get_parameter(name) * keep)


def test_times_and_what_is_refused() -> None:
    method = MASKS["edge_popup"](sparsity=0.9)
    run = Clock(0, total_steps=10)
    assert [method.due(run.at(step)) for step in (0, 1, 10, 11)] == [False, True, True, False]
    assert not method.settled(run.at(9)) and method.settled(run.at(10))
    for changes, message in [
        (
            {"allocation": "global"},
            "allocation: expected a share for each layer, got 'global'; use uniform, er, erk or a map",
        ),
        ({"learning_rate": 0}, "learning_rate: expected greater than 0, got 0"),
        ({"weights": "constant"}, "weights: expected 'signed_constant' or 'own', got 'constant'"),
    ]:
        refused(lambda changes=changes: Recipe.from_dict({"mask": {**SPEC, **changes}}), message)
    session = Session(Digits(), {"mask": SPEC}).attach()
    refused(
        lambda: session.start(sgd(session.model.parameters())), "edge_popup.until: time '1dur': expected a run of known"
    )


def test_what_is_kept_beside_a_weight_is_what_this_mask_needs() -> None:
    """A field of the same name as another method's (`momentum`) does not make it one of that kind."""
    net = Digits()
    Session(net, {"mask": SPEC, "tweaks": []}).attach()
    beside = {name for name, _ in net.body[3].named_buffers(recurse=False)}
    assert beside == {f"weight_{what}" for what in ("mask", "seen", "fixed", "scores", "speeds")}
