"""`train: norms`: gamma and beta move, and nothing else does."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import refused
from moving_cases import MOVING, Digits, digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tost_plugins import Recipe, Session
from tost_plugins.session.norms_alone import norm_parameters
from tost_plugins.training.params import prunable

STEPS = 6
SPARSE: dict[str, Any] = {"kind": "snip", "sparsity": 0.6}
DENSE: dict[str, Any] = {"kind": "random", "sparsity": 0}
NORMS = {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"}


def make(kind: str, params: Any) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)


def train(
    net: nn.Module, session: Session, optimizer: torch.optim.Optimizer, first: int = 0, last: int = STEPS
) -> None:
    for x, y in digits(STEPS)[first:last]:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mask", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_nothing_else_moves(mask: dict[str, Any], optimizer: str, when: str) -> None:
    net = Digits()
    start = values(net)
    early = make(optimizer, net.parameters()) if when == "before attach" else None
    for param in net.parameters():
        param.grad = torch.ones_like(param)  # left over from what was there before
    session = Session(net, {"mask": mask, "tweaks": [], "train": "norms"}).attach()
    made = early or make(optimizer, net.parameters())
    with session.drive(made, digits(2), F.cross_entropy, total_steps=STEPS):
        begun = values(net)
        train(net, session, made)
        found = session.mask
    assert moved(begun, values(net)) == NORMS
    for name, param in prunable(net).items():
        assert torch.equal(param.detach(), start[name] * found[name])
    assert all(param.requires_grad for param in net.parameters())
    assert set(net.state_dict()) == set(Digits().state_dict())


def test_training_goes_on_as_a_whole_after_finish() -> None:
    net = Digits()
    session = Session(net, {"mask": SPARSE, "train": "norms"})
    optimizer = make("sgd", net.parameters())
    with session.drive(optimizer, digits(2), F.cross_entropy, total_steps=STEPS):
        train(net, session, optimizer)
    before = values(net)
    F.cross_entropy(net(digits(1)[0][0]), digits(1)[0][1]).backward()
    optimizer.step()
    assert moved(before, values(net)) == set(before)


def test_what_was_frozen_stays_frozen() -> None:
    net = Digits()
    net.body[1].requires_grad_(False)
    net.body[0].bias.requires_grad_(False)
    session = Session(net, {"mask": DENSE, "train": "norms"})
    optimizer = make("sgd", [param for param in net.parameters() if param.requires_grad])
    before = values(net)
    with session.drive(optimizer, total_steps=STEPS):
        train(net, session, optimizer)
    assert moved(before, values(net)) == {"body.4.weight", "body.4.bias"}
    frozen = [name for name, param in net.named_parameters() if not param.requires_grad]
    assert frozen == ["body.0.bias", "body.1.weight", "body.1.bias"]


def test_tweaks_on_top() -> None:
    net = Digits()
    tweaks = [
        {"kind": "ghost_skip", "until": "0.5dur"},
        {"kind": "soft_activation", "until": "0.5dur"},
        {"kind": "rescaled_init", "iterations": 2},
    ]
    session = Session(net, {"mask": SPARSE, "tweaks": tweaks, "train": "norms"}).attach()
    optimizer = make("adamw", net.parameters())
    start = values(net)
    with session.drive(optimizer, digits(2), F.cross_entropy, total_steps=STEPS):
        train(net, session, optimizer, 0, 2)
        ghosts = {name for name in moved(start, values(net)) if "ghost" in name}
        assert ghosts and not any(name.endswith("conv.weight") for name in ghosts)
        train(net, session, optimizer, 2)
        found = session.mask
    assert moved({name: value * found.get(name, torch.ones(1)) for name, value in start.items()}, values(net)) == NORMS


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_resumes_bit_for_bit(stop: int) -> None:
    spec = {"mask": SPARSE, "tweaks": [], "train": "norms"}

    def begin(net: nn.Module) -> tuple[Session, torch.optim.Optimizer]:
        return Session(net, spec).attach(), make("sgd", net.parameters())

    net = Digits()
    session, optimizer = begin(net)
    with session.drive(optimizer, digits(2), F.cross_entropy, total_steps=STEPS):
        train(net, session, optimizer, 0, stop)
        saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), session.state_dict()))
        train(net, session, optimizer, stop)
    other = Digits()
    session, optimizer = begin(other)
    for part, state in zip((other, optimizer, session), saved, strict=True):
        part.load_state_dict(state)
    with session.drive(optimizer, digits(2), F.cross_entropy, total_steps=STEPS):
        train(other, session, optimizer, stop)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    whole = Session(Digits(), {**spec, "train": "all"}).attach()
    refused(lambda: whole.load_state_dict(saved[2]), "expected a checkpoint of the same train, got 'norms'")


def test_copies_and_averages() -> None:
    net = Digits()
    session = Session(net, {"mask": SPARSE, "train": "norms"}).attach()
    optimizer, average = make("sgd", net.parameters()), AveragedModel(net)
    with session.drive(optimizer, digits(2), F.cross_entropy, total_steps=STEPS):
        train(net, session, optimizer, 0, 3)
        average.update_parameters(net)
        twin = copy.deepcopy(net)
        train(net, session, optimizer, 3)
    other = Session(twin, {"mask": SPARSE, "train": "norms"})  # a copy is taken over as it is, in the middle of the run
    made = make("sgd", twin.parameters())
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = values(twin)
    with other.drive(made, digits(2), F.cross_entropy, total_steps=STEPS):
        assert other.mask == session.mask and other.clock.step == 3
        train(twin, other, made, 3)
    assert moved(before, values(twin)) == NORMS
    assert all(param.requires_grad for param in (*twin.parameters(), *session.plain(average).parameters()))


class Llama_RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()


def test_norms_of_every_kind_count() -> None:
    norms = [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(4)]
    net = nn.Sequential(nn.Linear(4, 4), *norms, Llama_RMSNorm(), nn.InstanceNorm1d(4))
    assert len(norm_parameters(net)) == 2 * 4 + 1 + 1
    assert norm_parameters(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1))) == []


def test_what_cannot_be_is_refused_in_a_line() -> None:
    plain = Digits(norm=False)
    session = Session(plain, {"mask": DENSE, "train": "norms"})
    refused(session.attach, "train norms: expected norm layers whose scale and shift train, got none in Digits; leave")
    assert all(param.requires_grad for param in plain.parameters()) and session.state == "new"
    net = Digits()
    others = torch.optim.SGD([net.body[0].weight], lr=0.1)
    session = Session(net, {"mask": DENSE, "train": "norms"}).attach()
    refused(
        lambda: session.start(others, total_steps=1), "train norms: expected an optimizer that has the norms' scales"
    )
    for mask in MOVING.values():
        refused(
            lambda mask=mask: Recipe.from_dict({"mask": mask, "train": "norms"}),
            f"train: expected all beside a mask that moves with its weights, got 'norms' and {mask['kind']}; use a mask",
        )
    refused(
        lambda: Recipe.from_dict({"mask": DENSE, "train": "biases"}), "train: expected 'all' or 'norms', got 'biases'"
    )
    assert Recipe.of({"mask": DENSE}, train="norms").train == "norms"


def test_two_ranks_train_what_one_rank_trains_with_the_whole_batch(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(here / "ranks/norms_ddp.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    before = values(net)
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "train": "norms"}).attach()
    optimizer = make("sgd", net.parameters())
    with session.drive(optimizer, total_steps=STEPS):
        for x, y in digits(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
    for name, value in values(net).items():
        torch.testing.assert_close(ranks[0][name], value)
        assert torch.equal(ranks[0][name], ranks[1][name])
    kept = {name: before[name] * session.mask.get(name, torch.ones(1)) for name in before}
    assert moved(kept, ranks[0]) == {"1.weight", "1.bias"}
