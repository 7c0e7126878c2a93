"""Gradient checkpointing, in all its forms: looking finds the mask of the same network without it, and changes nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tost_plugins import Session, TostError, masks
from tost_plugins.training.functions import checkpoints_run_once
from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import rescale

Run = Callable[..., Tensor]


def plainly(block: Any, x: Tensor) -> Tensor:
    return block(x)


def in_sequence(use_reentrant: bool, block: Any, x: Tensor) -> Tensor:
    return checkpoint_sequential([block, nn.Identity()], 2, x, use_reentrant=use_reentrant)


FORMS: dict[str, Run] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "without random states": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "in sequence": partial(in_sequence, False),
    "in sequence, reentrant": partial(in_sequence, True),
}


class Net(nn.Module):
    """A checkpointed module, with statistics and dropout, and a checkpointed method that calls relu as a function."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Dropout(0.2))
        self.side, self.head, self.run = nn.Conv2d(6, 6, 1), nn.Linear(6, 4), run

    def relu(self, x: Tensor) -> Tensor:
        return F.relu6(self.side(x) * 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.relu, self.run(self.block, self.stem(x))).mean((2, 3)))


BATCHES = [(torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4)]
OPTIONS: dict[str, dict[str, Any]] = {"snip": {}, "grasp": {"per_class": 3}, "synflow": {"rounds": 3}}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_mask_is_that_of_the_network_without(form: str, kind: str) -> None:
    net = Net(FORMS[form])
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    found = masks.find(net, kind, 0.5, BATCHES, **OPTIONS[kind])
    assert found == masks.find(Net(plainly), kind, 0.5, BATCHES, **OPTIONS[kind])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(param.grad is None for param in net.parameters()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", FORMS)
def test_so_is_the_initialisation(form: str) -> None:
    found = [rescale(Task.of(Net(run), batches=BATCHES), {}, iterations=2) for run in (FORMS[form], plainly)]
    assert found[0] == found[1]


@pytest.mark.parametrize("form", FORMS)
def test_training_is_checkpointed_again_after_the_look(form: str) -> None:
    net = Net(FORMS[form])
    runs: list[str] = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []}).drive(
        optimizer, BATCHES, total_steps=1
    ):
        net.side.register_forward_hook(lambda *_: runs.append("side"))
        F.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
        optimizer.step()
    assert len(runs) == 2


def test_what_is_inside_is_put_back_after_an_error() -> None:
    before = torch.utils.checkpoint.CheckpointFunction
    with pytest.raises(KeyError), checkpoints_run_once():
        assert torch.utils.checkpoint.CheckpointFunction is not before
        raise KeyError
    assert torch.utils.checkpoint.CheckpointFunction is before


class OfAnotherLibrary(torch.autograd.Function):
    """A checkpoint as others write it, which nobody can switch off from here."""

    @staticmethod
    def forward(ctx: Any, block: Any, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), grad)
        return None, x.grad


@pytest.mark.parametrize("kind", ["snip", "synflow"])
def test_checkpoints_of_other_libraries_are_refused_by_name(kind: str) -> None:
    net = Net(OfAnotherLibrary.apply)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TostError, match="run again by gradient checkpointing; switch"):
        masks.find(net, kind, 0.5, BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(param.grad is None for param in net.parameters())
