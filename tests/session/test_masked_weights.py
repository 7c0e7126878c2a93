"""The one promise: after every step of the outermost optimizer every removed weight is exactly 0, whatever it is and however
it is wrapped, and what it keeps for removed weights is what it gives a new one."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins import Session
from tost_plugins.session.optimizer_state import numbers, start_values
from tost_plugins.training.params import prunable

RANDOM = {"kind": "random", "sparsity": 0.9, "allocation": "uniform"}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "noisy": lambda p: Noisy(p, 0.05, momentum=0.9),
}


class Noisy(torch.optim.SGD):
    """Langevin dynamics: noise on every weight, after the step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param += 1e-3 * torch.randn_like(param)
        return loss


class Net(nn.Sequential):
    """A small layer, a large dense one and a large convolution, laid out channels last."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(2, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 4 * 4, 70), nn.ReLU(), nn.Linear(70, 5),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: Optimizer, count: int) -> Iterator[None]:
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        yield


def outside(session: Session) -> list[str]:
    """The names of weights that are not 0 where the mask removes them."""
    params = prunable(session.model).items()
    return [name for name, param in params if bool(param.detach()[~session.mask[name]].any())]


def remembered(session: Session, optimizer: Optimizer) -> dict[str, set[float]]:
    """The different numbers that an optimizer keeps for removed weights, by their keys."""
    found: dict[str, set[float]] = {}
    for name, param in prunable(session.model).items():
        for key, value in numbers(param, optimizer.state[param]):
            found.setdefault(key, set()).update(value[~session.mask[name]].tolist())
    return found


def _noise(param: Tensor) -> None:
    param.grad.data.normal_(0, 0.02)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "mask", [RANDOM, {**RANDOM, "kind": "rigl", "every": "2ba"}, {**RANDOM, "kind": "set", "every": "3ba"}]
)
def test_every_optimizer_leaves_zeros_and_removed_weights_keep_the_state_of_new_ones(
    kind: str, mask: dict[str, Any]
) -> None:
    net = Net()
    optimizer = OPTIMIZERS[kind](net.parameters())
    session = Session(net, {"mask": mask})
    with session.drive(optimizer, total_steps=7):
        for _ in train(net, optimizer, 7):
            assert not outside(session)
            for param in prunable(net).values():
                starts = {key: {value} for key, value in start_values(optimizer, param).items()}
                assert remembered(session, optimizer).items() <= starts.items()


@pytest.mark.parametrize("what", ["weights", "one layer", "state", "loaded state", "gradients"])
def test_what_others_write_is_gone_after_the_next_step(what: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    session = Session(net, {"mask": RANDOM})
    with session.drive(optimizer, total_steps=20):
        steps = train(net, optimizer, 20)
        next(steps)
        dense = copy.deepcopy(optimizer.state_dict())
        for state in dense["state"].values():
            state["momentum_buffer"].normal_(0, 0.02)
        if what == "loaded state":
            optimizer.load_state_dict(dense)
        for param in [net[2].weight] if what == "one layer" else prunable(net).values():
            if what in ("weights", "one layer"):
                param.data.normal_(0, 0.02)
            elif what == "state":
                optimizer.state[param]["momentum_buffer"].data.normal_(0, 0.02)
            elif what == "gradients":
                param.register_post_accumulate_grad_hook(_noise)
        for _ in range(3):
            next(steps)
            assert not outside(session)


def test_a_single_number_that_somebody_wrote_is_gone_after_the_next_step() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    session = Session(net, {"mask": RANDOM})
    with session.drive(optimizer, total_steps=3):
        steps = train(net, optimizer, 3)
        next(steps)
        row, column = (~session.mask["5.weight"]).nonzero()[-1].tolist()
        net[5].weight.data[row, column] = 1.0
        next(steps)
        assert net[5].weight[row, column] == 0
