"""sharpness: gradients uphill of the weights, which only the training forward pass sees; in every loop and on two ranks."""

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from step_cases import TRAINERS, Around, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tost_plugins import Mask, Session, TostError
from tost_plugins.lab.export import export
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import train as train_recipe
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.sharpness import Sharpness

RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}
RHO = 0.3
SHARP = {"kind": "sharpness", "rho": RHO}
STEPS = 6


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def by_hand(net: nn.Module, mask: Mask, rho: float, until: int) -> nn.Module:
    """The network after its steps, each with weights that are moved and put back."""
    params, optimizer = dict(net.named_parameters()), optimizer_of(net)
    mask.apply_(params)
    ascent = {name: torch.zeros_like(params[name]) for name in mask}
    for step, (x, y) in enumerate(digits(STEPS)):
        plain = {name: params[name].detach().clone() for name in mask}
        with torch.no_grad():
            for name in mask:
                params[name].add_(ascent[name] if step < until else 0)
        optimizer.zero_grad()
        F.cross_entropy(net(x.double()), y).backward()
        with torch.no_grad():
            for name in mask:
                params[name].copy_(plain[name])
                params[name].grad.mul_(mask[name])
            size = torch.cat([params[name].grad.flatten() for name in mask]).norm()
            ascent = {name: rho * params[name].grad / size for name in mask}
        optimizer.step()
        mask.apply_(params)
    return net


@pytest.mark.parametrize("until", [None, 4])
def test_a_run_is_that_of_weights_moved_by_hand(until: int | None) -> None:
    net = Digits().double()
    tweak = SHARP if until is None else {**SHARP, "until": f"{until}ba"}
    session = run(net, tweak)
    wanted = by_hand(Digits().double(), session.mask, RHO, until or STEPS)
    plain = by_hand(Digits().double(), session.mask, 0.0, 0)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)
    assert not torch.allclose(net.body[7].weight, plain.body[7].weight, rtol=1e-3)


def run(net: nn.Module, tweak: dict[str, Any], look: Any = lambda session, x: None, **recipe: Any) -> Session:
    """A run of this network in a plain loop; `look` comes between forward and backward."""
    session = Session(net, {"mask": RANDOM, "tweaks": [tweak], **recipe}).attach()
    optimizer = optimizer_of(net)
    with session.drive(optimizer, digits(STEPS), total_steps=STEPS):
        for x, y in digits(STEPS):
            x = x.to(next(net.parameters()).dtype)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            look(session, x)
            loss.backward()
            optimizer.step()
    return session


def test_only_the_training_forward_pass_sees_it() -> None:
    net, plain = Digits(norm=False), Digits(norm=False)
    average: list[nn.Module] = []
    moved: list[bool] = []

    def look(session: Session, x: Tensor) -> None:
        """In the middle of a step, and from every side."""
        own = {name: value for name, value in net.state_dict().items() if name in plain.state_dict()}
        plain.load_state_dict(own)
        assert all(torch.equal(value, net.get_parameter(name)) for name, value in plain.named_parameters())
        assert not any(bool(net.get_parameter(name)[~kept].any()) for name, kept in session.mask.items())
        wanted = plain(x)
        moved.append(not torch.equal(net(x), wanted))
        with session.tweaks.quiet():
            assert torch.equal(net(x), wanted)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), *average):
            if twin not in average:
                assert torch.equal(twin(x), wanted)
        net.eval()
        assert torch.equal(net(x), wanted)
        net.train()
        if not average:
            average.append(AveragedModel(net))
        average[0].update_parameters(net)
        session.report()
        own = average[0].module.state_dict()
        plain.load_state_dict({name: own[name] for name in plain.state_dict()})
        assert torch.equal(average[0].train()(x), plain(x))

    session = run(net, SHARP, look)
    assert moved == [False] + [True] * (STEPS - 1)  # the first step has no gradient before it
    assert list(net.state_dict()) == list(plain.state_dict())
    assert Mask.from_zeros(prunable(net)) == session.mask
    session.plain(average[0])


def perturbations(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_buffers() if name.endswith("tost_perturbation")}


@pytest.mark.parametrize("case", [case for case in MOVING if case != "edge_popup"])  # which refuses it
def test_with_a_mask_that_moves_what_is_removed_stays_so(case: str) -> None:
    net, lengths = Digits(norm=False), []

    def look(session: Session, x: Tensor) -> None:
        found = {name.replace("tost_perturbation", "weight"): value for name, value in perturbations(net).items()}
        assert found.keys() == session.mask.keys()
        assert not any(bool(found[name][~kept].any()) for name, kept in session.mask.items())
        lengths.append(float(torch.cat([value.flatten() for value in found.values()]).norm()))

    run(net, SHARP, look, mask=MOVING[case])
    assert lengths[0] == 0 and all(0.5 * RHO < length < 1.0001 * RHO for length in lengths[1:])


CASES = {
    "static": {"mask": RANDOM, "tweaks": [SHARP]},
    "tweaks": {
        "mask": {"kind": "eoi", "sparsity": 0.6},
        "tweaks": [
            {"kind": "ghost_skip", "until": "4ba"},
            {"kind": "soft_activation", "until": "7ba"},
            {"kind": "sparse_init", "isometry": "approximate", "steps": 5},
            {"kind": "label_smoothing"},
            {**SHARP, "until": "8ba"},
        ],
    },
    "rigl": {"mask": MOVING["rigl"], "tweaks": [SHARP]},
    "dnw": {"mask": MOVING["dnw"], "tweaks": [SHARP]},
}


def weights(session: Session) -> dict[str, Tensor]:
    """Under the network's own names: adapters wrap it."""
    return {name.replace("module.", ""): value.clone() for name, value in session.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "case", ["tweaks", "dnw", *(pytest.param(case, marks=pytest.mark.long) for case in ("static", "rigl"))]
)
@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_every_trainer_ends_with_the_same_network(trainer: str, case: str) -> None:
    found = [weights(train(which, Around(CASES[case], clip=0.5))) for which in ("torch", trainer)]
    assert same(*found)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_micro_batches_share_the_perturbation_of_their_step(trainer: str) -> None:
    found = []
    for parts in (1, 4):
        net = Digits(norm=False).double()
        train(trainer, Around(CASES["static"], parts=parts, clip=0.5, dtype=torch.float64), net)
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("trainer", ["torch", "accelerate"])
def test_a_step_that_a_scaler_skips_hands_the_perturbation_on(trainer: str) -> None:
    overflows = (2, 5)
    skipped = train(trainer, Around(CASES["static"], scaled=True, overflows=overflows), Digits(norm=False))
    without = train("torch", Around(CASES["static"], scaled=True, left_out=overflows), Digits(norm=False))
    assert same(weights(skipped), weights(without))


def test_it_compiles_again_once_when_it_ends() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    recipe = {"mask": MOVING["rigl"], "tweaks": [{**SHARP, "until": "5ba"}]}
    look = lambda step, session: graphs.append(counters["stats"]["unique_graphs"])  # noqa: E731
    compiled = weights(train("torch", Around(recipe, backend="eager", look=look)))
    torch._dynamo.reset()
    assert graphs[0] >= 1 and graphs[-1] - graphs[0] == 1, graphs
    for name, value in weights(train("torch", Around(recipe))).items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_compact_layers_compute_the_same() -> None:
    found = []
    for compact in (False, True):
        net = Digits().double()
        mask = Mask({name: torch.rand_like(param).lt(0.5) for name, param in seeded(prunable(net)).items()})
        mask = Mask({name: kept & dead(name, kept) for name, kept in mask.items()})
        session = Session(net, {"mask": RANDOM, "tweaks": [SHARP], "compact": compact}, mask).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with session.drive(optimizer, digits(STEPS), total_steps=STEPS):
            for x, y in digits(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(net(x.double()), y).backward()
                optimizer.step()
        found.append({name: param.detach().clone() for name, param in prunable(net).items()})
        live = session.mask
    for name, kept in live.items():
        torch.testing.assert_close(found[1][name], found[0][name] * kept, rtol=1e-6, atol=1e-9)


def seeded(params: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    return params


def dead(name: str, kept: Tensor) -> Tensor:
    """Some channels of the second convolution read nothing, and are read by nobody, so that all that is kept is live."""
    stays = torch.ones_like(kept)
    if name == "body.3.weight":
        stays[::2] = False
    if name == "body.7.weight":
        stays.view(10, 8, 9)[:, ::2] = False
    return stays


RECIPE = {
    "mask": {"kind": "eoi", "sparsity": 0.9},
    "tweaks": [{"kind": "sparse_init"}, {**SHARP, "until": "0.8dur"}],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 128, "batch_size": 32},
    "optimizer": {"lr": 0.05},
    "duration": "6ba",
}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_stops_goes_on_bit_for_bit(trainer: str, tmp_path: Path) -> None:
    if trainer != "torch":
        pytest.importorskip(trainer)
    spec, whole, stopped = Recipe.from_dict({**RECIPE, "trainer": trainer}), tmp_path / "whole", tmp_path / "stopped"
    result = train_recipe(spec, whole)
    assert result["left_out"] == [] and result["tweaks"] == ["sparse_init", "sharpness"]

    def stop(event: str, values: dict[str, Any]) -> None:
        if event == "step" and values["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        train_recipe(spec, stopped, listen=stop)
    plain = tmp_path / "plain.safetensors"
    assert export(stopped, plain)["sparsity"] == pytest.approx(0.9, abs=1e-2)
    assert train_recipe(spec, stopped, resume=True) == result
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_weights_of_a_plain_network_are_not_moved() -> None:
    net = Digits()
    session = Session(net, {"mask": RANDOM, "tweaks": [SHARP]}).attach()
    optimizer = optimizer_of(net)
    session.start(optimizer, total_steps=4)
    for x, y in digits(2):
        F.cross_entropy(net(x), y).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    assert all(value.any() for value in perturbations(net).values())
    saved = copy.deepcopy(net.state_dict())
    net.load_state_dict(Digits().state_dict())
    assert not any(value.any() for value in perturbations(net).values())
    net.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in perturbations(net).items())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(5, 8), nn.MultiheadAttention(8, 2)
        self.own, self.head = nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.own(self.attention(x, x, x)[0]))


def test_weights_that_others_read_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    net = Shared()
    with caplog.at_level("INFO"):
        Sharpness().attach(net, 0)
    assert list(perturbations(net)) == ["own.tost_perturbation"]
    assert "sharpness: 2 weights stay as they are" in caplog.text
    assert "attention.out_proj.weight, head.weight" in caplog.text
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(
        TostError, match="sharpness: expected a layer that alone reads its weight, got none in Sequential"
    ):
        Session(tied, {"mask": RANDOM, "tweaks": [SHARP]}).attach()
    left = Session(tied, {"mask": RANDOM, "tweaks": [{**SHARP, "optional": True}]}).attach().left_out
    assert len(left) == 1 and left[0].startswith("sharpness (expected a layer that alone reads its weight")


def test_rho_is_above_0() -> None:
    for rho in (0.0, -1.0, float("inf")):
        with pytest.raises(TostError, match=r"tweaks.*rho: expected"):
            Session(Digits(), {"mask": RANDOM, "tweaks": [{"kind": "sharpness", "rho": rho}]})


def test_weights_that_get_no_gradient_do_not_move() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    session = Session(net, {"mask": RANDOM, "tweaks": [SHARP]}).attach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session.start(optimizer, total_steps=4)
    for x in (torch.ones(2, 4), torch.zeros(2, 4)):  # the first layer's gradient is 0 in the second step
        net.zero_grad()
        (net[1](x).sum() if not x.any() else net(x).sum()).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    assert not any(bool(value.any()) for value in perturbations(net).values())
    assert all(bool(param.isfinite().all()) for param in net.parameters())


def test_two_ranks_take_the_same_way_in_whole_weights_and_in_parts(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tests / "ranks/sharpness.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("ddp", "fsdp2"):
        assert same(first[kind], second[kind])
        assert first[kind].keys() == first["alone"].keys()
        for name, value in first[kind].items():
            torch.testing.assert_close(value, first["alone"][name], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(first["alone"]["body.7.weight"], first["plain"]["body.7.weight"], rtol=1e-3)


def test_layers_in_eval_mode_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    plain, still, norms = Digits().double(), Digits().double(), Digits().double()
    session = run(plain, {**SHARP, "until": "0ba"}, lambda session, x: session.model.eval())
    run(still, SHARP, lambda session, x: session.model.eval())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), still.parameters(), strict=True))
    count = len(session.mask)
    (line,) = [message for message in caplog.messages if "eval mode" in message]
    assert line.startswith(f"sharpness: {count} of {count} layers are in eval mode while the network trains, and take ")
    assert "body.0.weight" in line and line.endswith("; call model.train() (norms alone may stay in eval mode)")
    caplog.clear()

    def freeze_norms(session: Session, x: Tensor) -> None:
        for module in session.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    run(norms, SHARP, freeze_norms)
    assert "eval mode" not in caplog.text
