"""Two networks in one session that train by turns, as a GAN's, each with the other's weights off; layers that are frozen."""

import logging

import pytest
import torch
import torch.nn.functional as F
from moving_cases import AFTER, HIDES, MOVING, STEPS, Digits, digits
from torch import Tensor, nn

from tost_plugins import Session, TostError


class Pair(nn.Module):
    """A generator and a critic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))
        self.critic = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.critic(self.generator(noise))


def round_of(net: Pair, optimizers: dict[nn.Module, torch.optim.Optimizer]) -> None:
    """The critic's turn, then the generator's."""
    noise, real = torch.randn(16, 8), torch.randn(16, 16)
    for part, other in ((net.critic, net.generator), (net.generator, net.critic)):
        other.requires_grad_(False)
        loss = F.softplus(-net(noise)).mean()
        if part is net.critic:
            loss = F.softplus(-net.critic(real)).mean() + F.softplus(net(noise)).mean()
        optimizers[part].zero_grad()
        loss.backward()
        optimizers[part].step()
        other.requires_grad_(True)


def by_turns(case: str) -> Session:
    net = Pair()
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {
        part: torch.optim.Adam(part.parameters(), lr=0.01) for part in (net.critic, net.generator)
    }
    session = Session(net, {"mask": MOVING[case], "tweaks": []})
    with session.drive(list(optimizers.values()), total_steps=STEPS):
        for _ in range(STEPS):
            round_of(net, optimizers)
    return session


@pytest.mark.parametrize("case", AFTER)
def test_a_mask_that_moves_behind_the_step_moves_in_both(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tost_plugins")
    session = by_turns(case)
    assert session.clock.step == STEPS and not [line for line in caplog.messages if "do not train" in line]
    wanted = MOVING[case].get("sparsity")
    kept = sum(int(part.sum()) for part in session.mask.values())
    assert wanted is None or kept == round((1 - wanted) * sum(part.numel() for part in session.mask.values()))
    params = dict(session.model.named_parameters())
    assert all(not params[name][~part].any() for name, part in session.mask.items())


@pytest.mark.parametrize("case", HIDES)
def test_a_mask_that_hides_is_refused_when_the_second_turn_comes(case: str) -> None:
    with pytest.raises(TostError, match=rf"mask {MOVING[case]['kind']}: expected one gradient for each step"):
        by_turns(case)


def test_a_network_that_a_frozen_layer_leaves_too_full_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    net = Digits()
    session, optimizer = Session(net, {"mask": MOVING["gradual"]}), torch.optim.SGD(net.parameters(), lr=0.05)
    with session.drive(optimizer, total_steps=STEPS):
        for number, (x, y) in enumerate(digits(STEPS)):
            if number == 1:
                net.body[3].weight.requires_grad_(False)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith(f"finish at step {STEPS}: the network keeps ") and "left body.3.weight alone" in line
