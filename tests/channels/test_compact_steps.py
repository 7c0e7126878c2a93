"""Compact training: what is not computed was of no use. A run on the live part of a mask is the same with and without it."""

import copy
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from zoo import ZOO, Pool, build, data, inputs, logits, some_long

from tost_plugins import Mask, Session
from tost_plugins.channels.slices import slices_of
from tost_plugins.lab import models
from tost_plugins.masks import live
from tost_plugins.training.params import prunable

TWEAKS = [
    {"kind": "ghost_skip", "until": "4ba"},
    {"kind": "soft_activation", "until": "5ba"},
    {"kind": "label_smoothing"},
]
STEPS = 8
#: All their convolutions write to the same channels, and every one of these is used.
ONE_STREAM = ("pre_activation", "shared")
CIFAR = ("cifar/resnet8", "cifar/mobilenet_v2")


def network(name: str) -> nn.Module:
    """A network of the zoo, or a shipped one, in float64 and without dropout, whose channels are not the same each time."""
    net = models.build(name, 4) if name.startswith("cifar/") else build(name)
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return net.double()


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    found = data(name, 4) if name in ZOO else [(torch.randn(4, 3, 16, 16), torch.randint(4, (4,))) for _ in range(4)]
    return [(x.double(), y) for x, y in found]


def with_dead_channels(net: nn.Module, share: float = 0.4) -> Mask:
    """A mask that takes away many whole filters, and many weights of the others, but leaves a path."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, weight in prunable(net).items():
        keep = torch.rand(weight.shape, generator=generator) < 0.5
        rows = torch.rand(len(weight), generator=generator) < 1 - share
        keep &= rows.view(-1, *[1] * (weight.ndim - 1))
        keep[0] = True  # the first filter reads everything
        if weight.shape[1] > 1:
            keep[:, 0] = True  # and is read by all that there are
            keep[1:, 0] &= rows.view(-1, *[1] * (weight.ndim - 2))[1:]
        masks[name] = keep
    return Mask(masks)


def parts(net: nn.Module) -> list[str]:
    """The modules that compute less than all."""
    return [path for path, module in net.named_modules() if (s := slices_of(module)) is not None and s.part is not None]


def trained(net: nn.Module, mask: Mask, loader: Any, compact: bool, **changes: Any) -> dict[str, Any]:
    """What a run of a few steps leaves: losses, evaluations on the way, the state, and which modules were compact."""
    spec = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": TWEAKS, "compact": compact, **changes}
    session, losses, evaluations = Session(net, spec, mask).attach(), [], []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-3)
    criterion = session.criterion(nn.CrossEntropyLoss())
    with session.drive(optimizer, loader, total_steps=STEPS):
        compact_ones = parts(net)
        for x, y in itertools.islice(itertools.cycle(loader), STEPS):
            optimizer.zero_grad()
            loss = criterion(logits(net, x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                net.parameters(), 1.0
            )  # else rounding grows with each step in the deepest ones
            optimizer.step()
            losses.append(loss.item())
            net.eval()
            evaluations.append(logits(net, loader[0][0]).detach())
            net.train()
    return {
        "losses": losses,
        "evaluations": evaluations,
        "state": net.state_dict(),
        "parts": compact_ones,
        "mask": session.mask,
    }


def close(one: Any, two: Any, share: float = 1e-8) -> None:
    """Equal but for rounding."""
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        scale = float(two["state"][name].double().abs().max()) + 1e-6
        assert float((value.double() - two["state"][name].double()).abs().max()) <= share * scale, name
    torch.testing.assert_close(one["losses"], two["losses"], rtol=share, atol=share)
    # before their end ghosts keep statistics of their own, to which constants belong that nobody computes any more
    for mine, other in zip(one["evaluations"][4:], two["evaluations"][4:], strict=True):
        torch.testing.assert_close(mine, other, rtol=share, atol=share * float(other.abs().max()))


@pytest.mark.parametrize("name", some_long([*ZOO, *CIFAR]))
def test_a_compact_run_is_the_whole_one(name: str) -> None:
    net, loader = network(name), batches(name)
    mask = with_dead_channels(net)
    used = live(net, mask, loader[0])
    twin = copy.deepcopy(net)
    torch.manual_seed(0)
    compact = trained(net, mask, loader, True)
    torch.manual_seed(0)
    whole = trained(twin, used, loader, False)
    assert compact["mask"] == whole["mask"] == used
    assert not whole["parts"] and (compact["parts"] or name in ONE_STREAM)
    close(compact, whole)


def test_it_is_said_and_what_is_left_out_is_gone_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net, loader = network("functional"), batches("functional")
    modules = {path: type(module) for path, module in net.named_modules()}
    keys, mask = list(net.state_dict()), with_dead_channels(net)
    found = trained(net, mask, loader, True)
    lost = mask.kept - found["mask"].kept
    assert f"compact: {lost:,} of {mask.kept:,} kept weights lie on no path and are removed" in caplog.text
    assert "modules compute a part of their channels" in caplog.text
    assert {path: type(module) for path, module in net.named_modules()} == modules
    assert list(net.state_dict()) == keys and not parts(net)


def test_the_convolutions_see_fewer_channels() -> None:
    """By hand: of three filters one has lost all its weights, and the next layer is alone in reading another one."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1), Pool(), nn.Linear(2, 2)).double()
    mask = Mask({
        "0.weight": torch.tensor([1, 0, 1]).view(3, 1, 1, 1),
        "2.weight": torch.tensor([[1, 1, 0], [1, 0, 0]]).view(2, 3, 1, 1),
        "4.weight": torch.ones(2, 2),
    })  # fmt: skip
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "compact": True}, mask).attach()
    session.start(
        torch.optim.SGD(net.parameters(), lr=0.1),
        [(torch.randn(2, 1, 4, 4).double(), torch.zeros(2, dtype=torch.long))],
    )
    first, second = slices_of(net[0]), slices_of(net[2])
    assert first is not None and second is not None
    assert first.outputs.tolist() == second.inputs.tolist() == [0] and second.outputs is None
    assert session.mask["0.weight"].flatten().tolist() == [True, False, False]
    assert session.mask["2.weight"].flatten().tolist() == [True, False, False, True, False, False]
    shapes = []
    with torch.no_grad():
        handle = net[1].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        assert net(torch.randn(2, 1, 4, 4).double()).shape == (2, 2)
        handle.remove()
    assert shapes == [(2, 1, 4, 4)]


class View(nn.Module):
    """Counts its channels in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.conv(x).relu(), 4).view(len(x), 96))


class Attention(nn.Module):
    """A convolution, attention over its places, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv(x).relu()).flatten(2).transpose(1, 2)
        return self.fc(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("make, said", [(View, "view in"), (Attention, "multi_head_attention_forward in attention")])
def test_what_cannot_be_sliced_stays_whole_and_is_named(make: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    net = make().double()
    loader = [(torch.randn(4, 3, 8, 8).double(), torch.randint(4, (4,))) for _ in range(4)]
    mask, twin = with_dead_channels(net), copy.deepcopy(net)
    used = live(net, mask, loader[0])
    compact = trained(net, mask, loader, True, tweaks=[])
    close(compact, trained(twin, used, loader, False, tweaks=[]))
    assert said in caplog.text
    assert "fc" not in compact["parts"]


class Auxiliary(nn.Module):
    """Has a second head while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.aux, self.fc = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        out = self.fc(self.conv2(x).mean((2, 3)))
        return out + 0.3 * self.aux(x.mean((2, 3))) if self.training else out


def test_a_head_for_training_alone_is_seen_to() -> None:
    torch.manual_seed(0)
    net = Auxiliary().double()
    loader = [(torch.randn(4, 3, 8, 8).double(), torch.randint(4, (4,))) for _ in range(4)]
    session = Session(
        net, {"mask": {"kind": "random", "sparsity": 0.5}, "compact": True}, with_dead_channels(net)
    ).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), loader)
    assert session.left_out == [
        "compact (the network in eval mode does not run aux, whose channels nobody knows)"
    ] and not parts(net)
    net.train()(loader[0][0]).sum().backward()
    session.finish()


def test_what_a_hook_sees_stays_whole() -> None:
    net, loader = network("functional"), batches("functional")
    shapes: list[Any] = []
    net.block1.register_forward_hook(lambda module, args, out: shapes.append((args[0].shape[1], out.shape[1])))
    found = trained(net, with_dead_channels(net), loader, True)
    assert set(shapes) == {(6, 6)}
    assert "block3.bn1" in found["parts"] and "block1.bn2" not in found["parts"]


@pytest.mark.parametrize(
    "kind", ["rigl", "set", "snfs", "selfish", "dnw", "top_kast", "gradual", "ac_dc", "edge_popup"]
)
def test_a_mask_that_moves_is_not_compact_and_says_so(kind: str) -> None:
    net = network("functional")
    session = Session(net, {"mask": {"kind": kind, "sparsity": 0.5}, "compact": True}).attach()
    assert session.left_out[0].startswith(f"compact (a {kind} mask moves")
    assert all(slices_of(module) is None for module in net.modules())


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Kill after four of eight steps, load into a new model, and end where the run without a stop ends, bit for bit."""

    def begin(net: nn.Module, mask: Mask | None) -> tuple[Session, torch.optim.Optimizer]:
        spec = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": TWEAKS, "compact": True}
        return Session(net, spec, mask).attach(), torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def steps(session: Session, optimizer: Any, net: nn.Module, of: range) -> None:
        criterion = session.criterion(nn.CrossEntropyLoss())
        for i in of:
            x, y = loader[i % 4]
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            session.before_step()
            optimizer.step()
            session.after_step()

    loader, states = batches("functional"), []
    for stop in (None, 4):
        net = network("functional")
        session, optimizer = begin(net, with_dead_channels(net))
        session.start(optimizer, loader, total_steps=STEPS)
        steps(session, optimizer, net, range(stop or STEPS))
        if stop:
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            net = network("functional")
            session, optimizer = begin(net, None)
            net.load_state_dict(saved[0])
            session.start(optimizer, loader, total_steps=STEPS)
            optimizer.load_state_dict(saved[1])
            assert parts(net)
            steps(session, optimizer, net, range(stop, STEPS))
        session.finish()
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_averages_and_copies_are_the_whole_network() -> None:
    net, loader = network("functional"), batches("functional")
    session = Session(
        net, {"mask": {"kind": "random", "sparsity": 0.5}, "compact": True}, with_dead_channels(net)
    ).attach()
    average = AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with session.drive(optimizer, loader, total_steps=4):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            average.update_parameters(net)
        x = inputs("functional").double()
        twin = copy.deepcopy(net)
        torch.testing.assert_close(twin.eval()(x), net.eval()(x))
    plain = session.plain(average)
    assert not parts(plain) and plain.eval()(x).shape == (2, 4)


def test_under_autocast_a_compact_step_is_near_the_whole_one() -> None:
    net, loader = network("functional").float(), [(x.float(), y) for x, y in batches("functional")]
    mask, twin = with_dead_channels(net), copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compact = trained(net, mask, loader, True)
        whole = trained(twin, live(twin, mask, loader[0]), loader, False)
    close(compact, whole, 0.05)


def test_a_compiled_model_trains_compact() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net, loader = network("functional"), batches("functional")
        spec = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": TWEAKS[:2], "compact": True}
        session = Session(net, spec, with_dead_channels(net)).attach()
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        with session.drive(optimizer, loader, total_steps=STEPS):
            for x, y in itertools.islice(itertools.cycle(loader), STEPS):
                optimizer.zero_grad()
                F.cross_entropy(run(x), y).backward()
                optimizer.step()
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_two_ranks_train_compact_as_they_train_whole(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(root / "tests/ranks/compact_ddp.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first["compact"]["state"].items():
        assert torch.equal(value, second["compact"]["state"][name]), name
        torch.testing.assert_close(value, first["whole"]["state"][name], rtol=1e-8, atol=1e-10)
    assert first["compact"]["parts"] and not first["whole"]["parts"]
