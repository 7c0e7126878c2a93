"""Recurrent layers have masks like all others: every weight of an LSTM, a GRU and an RNN, under its own name."""

import copy
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING
from recurrent_nets import Letters, trained, windows
from safetensors.torch import load_file
from torch import Tensor, nn

from tost_plugins import Mask, Session, masks
from tost_plugins.lab.export import export
from tost_plugins.masks import MASKS, find
from tost_plugins.session.restarts import RestartingAverage
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import left_out, prunable
from tost_plugins.training.task import Task

SELFISH = {"kind": "selfish", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6}
RECURRENT = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "gru.weight_ih_l0", "gru.weight_hh_l0"]
STEPS, HALF = 10, 5


def train(
    net: nn.Module,
    mask: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    look: Callable[[Session], None] = lambda session: None,
    resume: bytes | None = None,
) -> Session:
    """A run, or the rest of one from its checkpoint; `look` comes after each step."""
    session = Session(net, {"mask": mask, "tweaks": []}).attach()
    optimizer = optimizer or sgd(net)
    if resume is not None:
        for part, state in zip((net, optimizer), torch.load(io.BytesIO(resume)), strict=True):
            part.load_state_dict(state)
    batches = windows(STEPS)
    with session.drive(optimizer, batches, F.cross_entropy, total_steps=STEPS):
        for x, y in batches[0 if resume is None else HALF :]:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            for name, kept in session.mask.items():
                assert not net.get_parameter(name).detach()[~kept].any()
            look(session)
    return session


def halfway(net: nn.Module, mask: dict[str, Any], optimizer: torch.optim.Optimizer) -> tuple[Session, bytes]:
    """A whole run, and the checkpoint that was written in its middle."""
    files: list[bytes] = []

    def look(session: Session) -> None:
        if session.clock.step == HALF:
            files.append(saved(net, optimizer))

    return train(net, mask, optimizer, look), files[0]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)


def saved(net: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    return file.getvalue()


# ---- which weights


def test_the_weights_of_recurrent_layers_are_prunable_in_their_order() -> None:
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(3, 4),
            "rnn": nn.RNN(3, 4, nonlinearity="relu"),
            "fc": nn.Linear(4, 2),
        }
    )
    names = list(prunable(net))
    assert names == [name for name, param in net.named_parameters() if "weight" in name]
    assert len(names) == 12 + 2 + 2 + 1 and "lstm.weight_hr_l1_reverse" in names
    assert left_out(net) == []


@pytest.mark.parametrize(
    ("glob", "left"), [("lstm", 3), ("lstm.*", 3), ("*.weight_hh_l0", 3), ("lstm.weight_ih_l0", 4), ("[lg]*", 1)]
)
def test_ignore_leaves_them_out_by_layer_and_by_name(glob: str, left: int) -> None:
    assert len(prunable(Letters(), [glob])) == left


def test_allocations_name_them_too() -> None:
    mask = find(Letters(), "magnitude", 0.6, allocation={"lstm": 0.25, "*.weight_hh_l0": 0.5})
    assert [round(share, 2) for share in mask.sparsities().values()][:2] == [0.25, 0.25]
    assert mask.sparsities()["gru.weight_hh_l0"] == 0.5 and abs(mask.sparsity - 0.6) < 1e-3


def test_weights_that_something_else_computes_have_no_mask() -> None:
    net = Letters()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.lstm, "weight_hh_l0")
    assert list(prunable(net)) == ["lstm.weight_ih_l0", "gru.weight_ih_l0", "gru.weight_hh_l0", "head.weight"]
    assert "masks of reparametrised weights (lstm.weight_hh_l0)" in left_out(net)


@pytest.mark.parametrize("kind", ["random", "magnitude", "snip", "selfish", "rigl", "dnw"])
def test_methods_count_them_exactly_and_leave_the_network_alone(kind: str) -> None:
    net = Letters()
    before, size = copy.deepcopy(net.state_dict()), sum(param.numel() for param in prunable(net).values())
    mask = find(net, kind, 0.8, windows(2))
    assert list(mask) == [*RECURRENT, "head.weight"] and mask.kept == round(0.2 * size)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(windows(1)[0][0]), Letters()(windows(1)[0][0]))  # it still computes with its own weights


def test_scores_and_grasp_reach_through_time() -> None:
    """SynFlow and GraSP, whose gradients are of the first and of the second order, on a classifier of sequences."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    data = [(torch.randn(12, 5, 4), torch.arange(12) % 3)]
    for kind, options in (("grasp", {"per_class": 4}), ("synflow", {"rounds": 5})):
        mask = find(Last(), kind, 0.5, data, **options)
        assert mask.kept == 204 and all(keep.any() for keep in mask.values())
    assert masks.live(Last(), mask)["rnn.weight_hh_l0"].equal(mask["rnn.weight_hh_l0"])  # numbers mix: all of it lives


# ---- training


@pytest.mark.parametrize("case", ["random", "selfish", *MOVING])
def test_a_language_model_trains_and_is_plain_and_sparse_at_the_end(case: str) -> None:
    mask = {"random": {"kind": "random", "sparsity": 0.6}, "selfish": SELFISH, **MOVING}[case]
    net, losses = Letters(), []
    session = train(
        net, mask, look=lambda session: losses.append(F.cross_entropy(net(windows(1)[0][0]), windows(1)[0][1]))
    )
    assert losses[-1] < losses[0] - 0.2
    assert list(net.state_dict()) == list(Letters().state_dict())
    kept = {name: session.mask[name] for name in RECURRENT}
    assert abs(session.mask.sparsity - mask["sparsity"]) < 1e-3 and all(
        0 < keep.float().mean() < 1 for keep in kept.values()
    )
    assert all(not net.get_parameter(name).detach()[~keep].any() for name, keep in kept.items())


@pytest.mark.parametrize("case", ["selfish", "dnw"])
def test_a_run_resumes_bit_for_bit(case: str) -> None:
    mask, whole, net = SELFISH if case == "selfish" else MOVING[case], Letters(), Letters()
    optimizer, other = (torch.optim.ASGD(each.parameters(), lr=0.5, t0=2) for each in (whole, net))
    end, state = halfway(whole, mask, optimizer)
    resumed = train(net, mask, other, resume=state)
    assert resumed.mask == end.mask
    for name, param in whole.named_parameters():
        assert torch.equal(param, net.get_parameter(name)), name
        assert torch.equal(optimizer.state[param]["ax"], other.state[net.get_parameter(name)]["ax"]), name


def test_a_checkpoint_from_before_they_had_masks_goes_on_with_them_dense(caplog: pytest.LogCaptureFixture) -> None:
    net = Letters()
    state, memory = torch.load(io.BytesIO(halfway(net, SELFISH, sgd(net))[1]))
    file = io.BytesIO()
    old = {name: value for name, value in state.items() if not (name.startswith(("lstm", "gru")) and "l0_" in name)}
    torch.save([old, memory], file)
    with caplog.at_level(logging.INFO, "tost_plugins"):
        session = train(Letters(), SELFISH, resume=file.getvalue())
    assert "without masks for 2 recurrent layers, which stay dense: lstm, gru" in caplog.text
    assert all(session.mask[name].all() for name in RECURRENT) and session.mask.sparsities()["head.weight"] > 0.5


def test_a_mask_without_them_leaves_them_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Mask({"head.weight": torch.arange(12 * Letters().head.out_features).view(-1, 12) % 2}).save(
        tmp_path / "old.safetensors"
    )
    with caplog.at_level(logging.INFO, "tost_plugins"):
        mask = find(Letters(), "file", path=str(tmp_path / "old.safetensors"))
    assert "mask: without recurrent weights, which stay dense: lstm.weight_ih_l0" in caplog.text
    assert [share for share in mask.sparsities().values()] == [0, 0, 0, 0, 0.5]


def test_a_checkpoint_of_a_run_is_exported_sparse(tmp_path: Path) -> None:
    net = Letters()
    torch.save(torch.load(io.BytesIO(halfway(net, SELFISH, sgd(net))[1]))[0], tmp_path / "checkpoint.pt")
    export(tmp_path / "checkpoint.pt", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert {*plain} == {*Letters().state_dict()}
    assert all(float((plain[name] == 0).float().mean()) > 0.5 for name in RECURRENT)


# ---- gates


def gates(mask: Mask, name: str) -> list[int]:
    return [int(gate.sum()) for gate in mask[name].chunk(4 if name.startswith("lstm") else 3)]


def test_every_gate_begins_alike_and_then_they_compete() -> None:
    first: list[Mask] = []
    net = Letters()
    session = train(net, SELFISH, look=lambda session: first.append(session.mask))
    for name in RECURRENT:
        start, end = gates(first[0], name), gates(session.mask, name)
        assert max(start) - min(start) <= 1 and start == sorted(start, reverse=True)
        assert sum(start) == sum(end)
        assert max(end) - min(end) > 1, "no weight has moved between gates"


def test_an_update_by_hand_takes_from_the_gate_of_small_weights() -> None:
    """A GRU of 1 unit with 4 inputs: its gates are 3 rows. All of the first row is small, so the move empties it."""
    mask = {"weight_ih_l0": torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()}
    weight = {"weight_ih_l0": torch.tensor([[0.1, 0.2, 0, 0], [3.0, 4, 0, 0], [5.0, 6, 0, 0]])}
    method = MASKS["selfish"](sparsity=0.5, drop=1 / 3)
    found = method.update(mask, weight, {}, Clock(0, 100), torch.Generator().manual_seed(0))["weight_ih_l0"]
    assert int(found.sum()) == 6 and found[1:, :2].all()
    grown = {int(method.update(mask, weight, {}, Clock(0, 100), torch.Generator().manual_seed(seed))["weight_ih_l0"][1:].sum())
             for seed in range(10)}  # fmt: skip
    assert grown - {4}, "random growth never leaves its gate"


def test_projections_have_one_gate() -> None:
    net = nn.LSTM(4, 6, proj_size=4)
    mask = MASKS["selfish"](sparsity=0.5).start(Task.of(net), torch.Generator())
    assert {name: int(keep.sum()) for name, keep in mask.items()} == {
        "weight_ih_l0": 48, "weight_hh_l0": 48, "weight_hr_l0": 12,
    }  # fmt: skip
    assert [int(gate.sum()) for gate in mask["weight_hh_l0"].chunk(4)] == [12] * 4


# ---- averages


def since_grown(seen: list[dict[str, Tensor]], kept: list[Mask], name: str, begin: int) -> Tensor:
    """The mean of a weight's values after each step from `begin` on, but for those before it was last grown."""
    total = torch.zeros_like(seen[0][name], dtype=torch.float64)
    count = torch.zeros_like(total)
    for weights, mask in list(zip(seen, kept, strict=True))[begin:]:
        total, count = (total + weights[name]) * mask[name], (count + 1) * mask[name]
    return total / count.clamp(min=1)


@pytest.mark.parametrize("every", ["step", "other"])
def test_a_restarting_average_is_the_mean_since_a_weight_was_grown(every: str) -> None:
    net, seen, kept = Letters(), [], []
    averages: list[RestartingAverage] = []

    def look(session: Session) -> None:
        averages[:] = averages or [RestartingAverage(net)]
        if every == "step" or session.clock.step % 2 == 0:  # once between two moves
            averages[0].update_parameters(net)
            seen.append({name: param.detach().clone() for name, param in net.named_parameters()})
            kept.append(session.mask)

    session = train(net, SELFISH, look=look)
    plain = session.plain(averages[0])
    for name in RECURRENT:
        expected = since_grown(seen, kept, name, 0)
        torch.testing.assert_close(plain.get_parameter(name).detach().double(), expected, rtol=1e-4, atol=1e-6)
        usual = torch.stack([weights[name] for weights in seen]).double().mean(0) * session.mask[name]
        assert (usual - expected).abs().max() > 1e-3, "no weight has come back, so nothing was tested"
    assert Mask.from_zeros(prunable(plain)) == session.mask
    bias = torch.stack([weights["lstm.bias_ih_l0"] for weights in seen]).mean(0)
    torch.testing.assert_close(plain.lstm.bias_ih_l0.detach(), bias)


def test_a_restarting_average_is_saved_with_what_it_counts() -> None:
    net = nn.Linear(4, 2, bias=False)
    Session(net, {"mask": {"kind": "set", "sparsity": 0.5}, "tweaks": []}).attach()
    first, second = RestartingAverage(net), RestartingAverage(net)
    for value in (1.0, 5.0):
        net.weight.data.fill_(value)
        first.update_parameters(net)
    second.load_state_dict(first.state_dict())
    net.weight.data.fill_(6.0)
    second.update_parameters(net)
    torch.testing.assert_close(second.module.weight.detach(), torch.full((2, 4), 4.0))


def test_an_average_of_a_network_without_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with masks, got Letters without any; make it after attach"):
        RestartingAverage(Letters())


@pytest.mark.parametrize("begin", [0, 2])
def test_asgd_averages_a_weight_since_it_was_grown(begin: int) -> None:
    net, seen, kept = Letters(), [], []
    optimizer = torch.optim.ASGD(net.parameters(), lr=0.5, t0=begin)
    taken = [0]

    def look(session: Session) -> None:
        steps = int(optimizer.state[net.head.weight]["step"])
        if steps == taken[0]:  # where the mask moves no step is taken
            return
        taken[0] = steps
        seen.append({name: param.detach().clone() for name, param in net.named_parameters()})
        kept.append(session.mask)
        for name in RECURRENT:
            ax, expected = (
                optimizer.state[net.get_parameter(name)]["ax"],
                since_grown(seen, kept, name, min(begin + 1, steps - 1)),
            )
            torch.testing.assert_close(ax.double(), expected, rtol=1e-4, atol=1e-5)

    train(net, SELFISH, optimizer, look=look)
    assert taken[0] == STEPS - 3
    name = RECURRENT[0]
    usual = torch.stack([weights[name] for weights in seen[begin + 1 :]]).double().mean(0) * kept[-1][name]
    assert (usual - optimizer.state[net.get_parameter(name)]["ax"]).abs().max() > 1e-5


def test_the_average_of_a_weight_that_has_just_come_back_is_itself() -> None:
    """Two weights; one leaves at step 2 and is back for step 3, when the other's average has three values."""
    weight = nn.Parameter(torch.tensor([[8.0, 4.0]]))
    net = nn.Linear(2, 1, bias=False)
    net.weight = weight
    session = Session(net, {"mask": {"kind": "set", "sparsity": 0.0, "every": "100ba"}, "tweaks": []}).attach()
    optimizer = torch.optim.ASGD([weight], lr=1.0, lambd=0.0, alpha=0.0, t0=0)
    session.start(optimizer, total_steps=200)
    for step, kept in enumerate(([1, 1], [1, 1], [1, 0], [1, 1])):
        weight.grad = torch.ones(1, 2)  # each step takes 1 off
        session.before_step()
        optimizer.step()
        session.weights.kept["weight"].copy_(torch.tensor([kept]))
        session.after_step()
        if step == 2:
            assert optimizer.state[weight]["ax"].tolist() == [[5.5, 0.0]]
            session.weights.kept["weight"].fill_(1)
    assert weight.tolist() == [[4.0, -1.0]]
    assert optimizer.state[weight]["ax"].tolist() == [
        [5.0, -1.0]
    ]  # of 6, 5 and 4, since ASGD begins with the second step


# ---- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks have found."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(here / "ranks/recurrent_ddp.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_train_what_one_rank_does_with_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    alone = trained()
    assert Mask(alone["masks"][0]) != Mask(alone["masks"][-1])
    for found in ranks:
        assert [Mask(mask) for mask in found["masks"]] == [Mask(mask) for mask in alone["masks"]]
        for part in ("weights", "averages"):
            for name, value in alone[part].items():
                torch.testing.assert_close(found[part][name], value)
                assert torch.equal(found[part][name], ranks[0][part][name])
