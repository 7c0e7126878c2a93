"""Recurrent layers where masks bring weights along and tweaks act on the steps: gates are neurons' rows like any others."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING
from recurrent_nets import Letters, windows
from test_recurrent import RECURRENT, SELFISH, since_grown
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError
from tost_plugins.session import buffers
from tost_plugins.training.params import owners, prunable
from tost_plugins.training.task import Task
from tost_plugins.tweaks.neuron_gradients import factors
from tost_plugins.tweaks.sharpness import Sharpness
from tost_plugins.tweaks.sparse_init import SparseInit

STEPS = 10
EVERY_TWEAK = [
    {"kind": "sparse_init", "isometry": "approximate", "steps": 20},
    "neuron_gradients",
    {"kind": "multiplicative", "warmup": "0ba"},
    "sharpness",
]


def train(net: nn.Module, recipe: dict[str, Any], optimizer: Any, look: Any = lambda session: None) -> Session:
    session = Session(net, recipe).attach()
    batches = windows(STEPS)
    with session.drive(optimizer, batches, F.cross_entropy, total_steps=STEPS):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            look(session)
    return session


@pytest.mark.parametrize("case", ["selfish", "snfs", "top_kast", "ac_dc"])
def test_a_language_model_trains_with_every_tweak(case: str) -> None:
    mask, net = {"selfish": SELFISH, **MOVING}[case], Letters()
    x, y = windows(1)[0]
    before = float(F.cross_entropy(net(x), y))
    session = train(net, {"mask": mask, "tweaks": EVERY_TWEAK}, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
    assert session.left_out == ["masks of Embedding (table.weight)"]
    assert float(F.cross_entropy(net(x), y)) < before - 0.2
    assert list(net.state_dict()) == list(Letters().state_dict())
    assert all(not net.get_parameter(name).detach()[~kept].any() for name, kept in session.mask.items())


def test_weights_of_one_layer_have_buffers_of_their_own() -> None:
    cases = {"snfs": {"momentum"}, "top_kast": {"hidden", "trained"}, "edge_popup": {"fixed", "scores", "speeds"}}
    for case, more in cases.items():
        net = Letters()
        Session(net, {"mask": MOVING[case], "tweaks": []}).attach()
        wanted = {f"{key}_{what}" for key in ("weight_ih_l0", "weight_hh_l0") for what in ("mask", "seen", *more)}
        assert {name for name, _ in net.lstm.named_buffers()} == wanted
        found = buffers.of(owners(net, prunable(net)), buffers.MASK)
        assert list(found) == [*RECURRENT, "head.weight"]
        assert all(found[name].shape == net.get_parameter(name).shape for name in found)


def test_eoi_gives_each_gate_a_matrix() -> None:
    net = nn.LSTM(6, 6, proj_size=3)
    session = Session(net, {"mask": {"kind": "eoi", "sparsity": 0.5, "allocation": "uniform"}, "tweaks": []})
    session.begin(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1)
    for name, gates in (("weight_ih_l0", 4), ("weight_hh_l0", 4), ("weight_hr_l0", 1)):
        for gate in net.get_parameter(name).detach().chunk(gates):
            short = gate if gate.shape[0] <= gate.shape[1] else gate.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)))


def test_sparse_init_brings_each_gate_near_an_isometry() -> None:
    net = nn.GRU(8, 8)
    task, kept = Task.of(net), torch.rand(24, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = {name: kept.clone() for name in task.params}
    Mask(mask).apply_(task.params)
    size = [float(net.get_parameter(name).norm(dim=1).square().sum()) for name in mask]
    SparseInit(isometry="approximate").start(task, mask)
    for name, before in zip(mask, size, strict=True):
        weight = net.get_parameter(name).detach()
        assert not weight[~kept].any() and float(weight.norm().square()) > before  # for the inputs that are left
        for gate in weight.chunk(3):
            rows = gate / gate.norm(dim=1, keepdim=True)
            assert (rows @ rows.T - torch.eye(8)).norm() < 0.8


def test_gradients_of_a_gate_s_rows_have_factors_of_their_own() -> None:
    net, seen = Letters(), []

    def gradients(*_: Any) -> None:
        seen.append({name: net.get_parameter(name).grad.clone() for name in RECURRENT})  # type: ignore[union-attr]

    for tweaks in ([], ["neuron_gradients"]):
        net = Letters()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        optimizer.register_step_post_hook(gradients)
        session = train(net, {"mask": {"kind": "random", "sparsity": 0.6}, "tweaks": tweaks}, optimizer)
    plain, multiplied = seen[0], seen[STEPS]
    for name in RECURRENT:
        torch.testing.assert_close(multiplied[name], plain[name] * factors(session.mask[name]))
        assert not torch.equal(multiplied[name], plain[name])


def test_sharpness_leaves_them_as_they_are_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = Letters()
    with caplog.at_level(logging.INFO):
        Sharpness().attach(net, 0)
    assert [name for name, _ in net.named_buffers()] == ["head.tost_perturbation"]
    assert "sharpness: 4 weights stay as they are (shared, recurrent, or read past their layer)" in caplog.text
    with pytest.raises(TostError, match="sharpness: expected a layer that alone reads its weight, got none in LSTM"):
        Sharpness().attach(nn.LSTM(2, 2), 0)


def test_averages_that_begin_again_are_of_what_the_optimizer_has_made_of_weights() -> None:
    """`multiplicative` changes weights after ASGD has taken them into its averages."""
    net, seen, kept = Letters(), [], []
    optimizer = torch.optim.ASGD(net.parameters(), lr=0.5, t0=0)
    optimizer.register_step_post_hook(
        lambda *_: seen.append({name: net.get_parameter(name).detach().clone() for name in RECURRENT})
    )

    def look(session: Session) -> None:
        if len(seen) > len(kept):  # where the mask moves no step is taken
            kept.append(session.mask)
            for name in RECURRENT:
                found: Tensor = optimizer.state[net.get_parameter(name)]["ax"]
                expected = since_grown(seen, kept, name, min(1, len(seen) - 1))
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    strong = {"kind": "multiplicative", "warmup": "0ba", "decay": 1.0}
    train(net, {"mask": SELFISH, "tweaks": [strong]}, optimizer, look)
    assert len(seen) == STEPS - 3 and kept[0] != kept[-1]
