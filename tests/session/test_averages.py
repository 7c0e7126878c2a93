"""Averaged weights obey the mask and become the plain sparse network; so do channels_last and SAM keep to it."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, STEPS, Digits, digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from tost_plugins import Mask, Session, TostError
from tost_plugins.training.params import prunable

TWEAKS = [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "7ba"}]
RANDOM = {"mask": {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}, "tweaks": TWEAKS}


def run(net: nn.Module, recipe: dict[str, Any], average: Any = None) -> tuple[Session, list[dict[str, Tensor]]]:
    """A finished run, and the network's weights after each step; `average` is made after attach."""
    session, optimizer, seen = Session(net, recipe).attach(), torch.optim.SGD(net.parameters(), lr=0.05), []
    averaged = average(net) if average else None
    with session.drive(optimizer, total_steps=STEPS):
        for x, y in digits(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            seen.append({name: param.detach().clone() for name, param in net.named_parameters() if "ghost" not in name})
            if averaged is not None:
                averaged.update_parameters(net)
                for name, param in prunable(averaged.module).items():
                    if session.moving is None:
                        assert not param.detach()[~session.mask[name]].any()
    session.average = averaged  # type: ignore[attr-defined]
    return session, seen


@pytest.mark.parametrize("case", ["static", "rigl", "dnw", "top_kast"])
def test_an_equal_average_becomes_the_plain_sparse_network(case: str) -> None:
    recipe = RANDOM if case == "static" else {"mask": MOVING[case], "tweaks": TWEAKS}
    net = Digits()
    session, seen = run(net, recipe, AveragedModel)
    plain, mask = session.plain(session.average), session.mask
    assert [type(m) for m in plain.modules()] == [type(m) for m in Digits().modules()]
    assert list(plain.state_dict()) == list(Digits().state_dict())
    assert Mask.from_zeros(prunable(plain)) == mask or case != "static"
    for name, param in plain.named_parameters():
        mean = torch.stack([weights[name] for weights in seen]).double().mean(0)
        keep = mask.get(name, torch.ones(1, dtype=torch.bool))
        torch.testing.assert_close(param.detach().double(), mean * keep, rtol=1e-5, atol=1e-6)
        assert param is not net.get_parameter(name) and (
            name not in mask or not torch.equal(param, net.get_parameter(name))
        )
    before = session.average.module.body[1].running_mean.clone()
    update_bn([x for x, _ in digits(3)], plain)
    assert not torch.equal(plain.body[1].running_mean, before)
    assert torch.equal(session.average.module.body[1].running_mean, before)  # it is a network of its own


def test_an_exponential_average_of_buffers_too() -> None:
    """It averages masks, alpha and the clock as well; the plain network takes the session's mask."""
    ema = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    session, seen = run(Digits(), {"mask": MOVING["rigl"], "tweaks": TWEAKS}, ema)
    expected = seen[0]["body.3.weight"]
    for weights in seen[1:]:
        expected = 0.5 * expected + 0.5 * weights["body.3.weight"]
    plain = session.plain(session.average)
    torch.testing.assert_close(plain.body[3].weight.detach(), expected * session.mask["body.3.weight"])
    assert not plain.body[3].weight.detach()[~session.mask["body.3.weight"]].any()


def test_an_equal_average_of_buffers_is_refused_by_torch() -> None:
    """As the documentation says: a mask is made of bools, which torch does not subtract."""
    with pytest.raises(RuntimeError, match="two bool tensors is not supported"):
        run(Digits(), RANDOM, functools.partial(AveragedModel, use_buffers=True))


def test_averages_that_cannot_be_right_are_refused() -> None:
    early = copy.deepcopy(Digits())
    net = Digits()
    session = Session(net, RANDOM).attach()
    copied = copy.deepcopy(net)
    with pytest.raises(TostError, match=r"plain: expected a finished session, got one that is attached; call finish"):
        session.plain(copied)
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=STEPS)
    session.finish()
    assert isinstance(session.plain(copied), Digits)
    with pytest.raises(TostError, match=r"plain: expected a copy of the attached model, got one without masks; make"):
        session.plain(early)
    with pytest.raises(TostError, match=r"got one without body.0.weight, .*; make the average after attach"):
        session.plain(nn.Linear(2, 2))
    with pytest.raises(
        TostError, match=r"plain: expected a copy of the attached model, or its state dict, got int; pass the"
    ):
        session.plain(3)  # type: ignore[arg-type]


def test_averages_of_another_network_are_named_for_what_they_are() -> None:
    net, x = nn.Sequential(Digits(), nn.Linear(10, 4)), digits(1)[0][0]
    for model, averaged, said in (
        (net, net[0], "got one of its part '0'; average the model that the session has"),
        (net, net[1], "got one of its part '1'; average the model that the session has"),
        (net[0], net, "got one of a network of which that is the part '0'; pass this part of it"),
    ):
        session = Session(model, RANDOM).attach()
        average = AveragedModel(averaged)
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=STEPS)
        session.finish()
        with pytest.raises(TostError, match=re.escape(said)):
            session.plain(average)
    assert session.plain(average.module[0])(x).shape == (len(x), 10)  # type: ignore[index]


def test_an_average_may_be_a_state_dict() -> None:
    net = Digits()
    session = Session(net, RANDOM).attach()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=STEPS)
    session.finish()
    for name, value in session.plain(state).state_dict().items():
        assert torch.equal(value, state[name] * session.mask.get(name, 1))


def test_channels_last_trains_the_same_network() -> None:
    """Also its masks and gradients lie that way, else multiplying them would cost many times as much."""
    ends = []
    for last in (False, True):
        net = Digits()
        if last:
            net = net.to(memory_format=torch.channels_last)
        session = Session(net, RANDOM).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with session.drive(optimizer, total_steps=STEPS):
            for x, y in digits(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last) if last else x), y).backward()
                optimizer.step()
            assert all(
                mask.stride() == param.stride()
                for param, mask in zip(session.weights.weights.values(), session.weights.kept.values(), strict=True)
            )
        assert net.body[3].weight.is_contiguous(memory_format=torch.channels_last) == last
        assert Mask.from_zeros(prunable(net)) == session.mask
        ends.append((session.mask, {name: param.detach().clone() for name, param in net.named_parameters()}))
    assert ends[0][0] == ends[1][0]
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-3, atol=1e-5)


class Sharp(torch.optim.SGD):
    """Sharpness-aware minimisation in a plain loop: the closure's second gradient is taken uphill."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        norm = torch.nn.utils.get_total_norm([param.grad for param in params])
        up = [0.05 * param.grad / norm for param in params]
        self.norms = [*getattr(self, "norms", []), norm]
        torch._foreach_add_(params, up)
        closure()
        torch._foreach_sub_(params, up)
        super().step()
        return loss


def test_sharpness_aware_steps_count_once_and_climb_within_the_mask() -> None:
    net, strengths = Digits(), []
    session, optimizer = Session(net, RANDOM), Sharp(net.parameters(), lr=0.05, momentum=0.9)
    with session.drive(optimizer, total_steps=STEPS):
        for i, (x, y) in enumerate(digits(STEPS), 1):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                for name, param in prunable(net).items():  # also while the weights are uphill
                    assert not param.detach()[~session.mask[name]].any() and not param.grad[~session.mask[name]].any()
                return loss

            optimizer.step(closure)
            assert session.clock.step == i
            strengths.append(session.metrics()["tost/ghost_skip/alpha"])
    assert strengths == [0.75, 0.5, 0.25] + [0.0] * 7 and len(optimizer.norms) == STEPS
    assert Mask.from_zeros(prunable(net)) == session.mask
