"""What a session says about the network, the checkpoint and the optimizer that it is given."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from tost_plugins import Mask, Session, TostError
from tost_plugins.session.places import Places
from tost_plugins.training.params import prunable

RANDOM: dict[str, Any] = {"kind": "random", "sparsity": 0.5, "allocation": "uniform"}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


# ---- what comes between attach and start


def _longer(net: nn.Module) -> None:
    net.body[3].weight = nn.Parameter(net.body[3].weight.detach().repeat(2, 1, 1, 1))


def _normed(net: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(net.body[3])


@pytest.mark.parametrize("change, said", [
    (_longer, r"start: expected the modules that were there at attach, got others at body.3; replace"),
    (_normed, r"body.3.weight: expected the weight that was stored there at attach, got one that is computed from others"),
])  # fmt: skip
def test_a_weight_that_is_another_at_the_start_is_named(change: Callable[[nn.Module], None], said: str) -> None:
    net = Digits()
    session = Session(net, {"mask": RANDOM, "tweaks": ["ghost_skip"]}).attach()
    change(net)
    with pytest.raises(TostError, match=said):
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1)


def test_a_part_with_a_session_is_named() -> None:
    net = nn.Sequential(Digits(), nn.Linear(10, 4))
    Session(net[0], {"mask": RANDOM, "tweaks": []}).attach()
    with pytest.raises(
        TostError, match=r"got those of 0, which has one; finish\(\) it first, or add '0\.\*' to `ignore`"
    ):
        Session(net, {"mask": RANDOM, "tweaks": []}).attach()
    assert list(Session(net, {"mask": {**RANDOM, "ignore": ["0.*"]}, "tweaks": []}).attach().run.params) == ["1.weight"]


def test_what_is_no_network_is_named() -> None:
    for thing, got in (([nn.Linear(2, 2)], "list"), (nn.Linear, "the class Linear"), (None, "NoneType")):
        with pytest.raises(TostError, match=f"attach: expected a torch.nn.Module, got {got}; pass the network itself"):
            Session(thing, {"mask": RANDOM, "tweaks": []}).attach()  # type: ignore[arg-type]


def test_a_given_mask_is_a_mask(tmp_path: Path) -> None:
    for thing in (str(tmp_path / "mask.pt"), {"fc.weight": torch.ones(2)}):
        with pytest.raises(
            TostError, match=r"mask: expected a Mask, got (str|dict); Mask.load\(path\) reads a file, Mask\(dict\)"
        ):
            Session(Digits(), {"mask": RANDOM, "tweaks": []}, mask=thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_or_a_pickle_of_a_session_leads_nothing_and_says_so(copied: Callable[[Session], Session]) -> None:
    net = Digits()
    session = Session(net, {"mask": RANDOM, "tweaks": ["ghost_skip", "soft_activation", "label_smoothing"]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def refused() -> None:
        twin = copied(session)
        said = "expected a session that was made for this model, got a copy of one"
        for call in (
            twin.attach,
            lambda: twin.start(optimizer, total_steps=1),
            twin.finish,
            lambda: twin.criterion(len),
        ):
            with pytest.raises(TostError, match=said):
                call()

    refused()
    session.attach()
    refused()
    session.start(optimizer, total_steps=9)
    refused()
    session.finish()
    refused()


# ---- layers that are replaced in mid-run


def _swap(net: nn.Module) -> None:
    net.body[3] = copy.deepcopy(net.body[3])


def _enlarge(net: nn.Module) -> None:
    net.body[3].weight = nn.Parameter(net.body[3].weight.detach().repeat(1, 1, 1, 1))


def _whole(net: nn.Module) -> None:
    net.body = copy.deepcopy(net.body)


def _pruned(net: nn.Module) -> None:
    prune.l1_unstructured(net.body[3], "weight", 0.5)


def _parametrized(net: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(net.body[3], "weight", nn.Identity())


@pytest.mark.parametrize("change", [_pruned, _parametrized])
@pytest.mark.parametrize("kind", ["random", "rigl", "dnw"])
def test_weights_that_something_hides_in_mid_run_are_named(kind: str, change: Callable[[nn.Module], None]) -> None:
    net = Digits()
    session = Session(net, {"mask": MOVING.get(kind, RANDOM), "tweaks": []})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    session.begin(optimizer, digits(4), total_steps=4)
    step(net, optimizer, digits(1)[0])
    change(net)
    with pytest.raises(
        TostError, match=r"step 1: expected weights as they were stored at the start, .* in body\.3 \(torch"
    ):
        step(net, optimizer, digits(1)[0])


@pytest.mark.parametrize("change", [_swap, _enlarge, _whole])
@pytest.mark.parametrize("kind", ["random", "rigl", "dnw"])
def test_a_layer_that_is_replaced_in_mid_run_is_named_at_once(kind: str, change: Callable[[nn.Module], None]) -> None:
    net = Digits()
    session = Session(net, {"mask": MOVING.get(kind, RANDOM), "tweaks": []})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def loop() -> None:
        with session.drive(optimizer, total_steps=8):
            for number, batch in enumerate(digits(8)):
                if number == 2:
                    change(net)
                    optimizer.add_param_group({"params": [p for p in net.parameters() if not _held(p, optimizer)]})
                step(net, optimizer, batch)

    with pytest.raises(TostError, match=r"^step 2: expected the layers that were there .* in the place of .*body\.3"):
        loop()
    net = Digits()
    session, other = Session(net, {"mask": RANDOM, "tweaks": []}), torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TostError, match=r"^finish: .*body\.3"), session.drive(other, total_steps=8):
        change(net)


def _held(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    return any(param is other for group in optimizer.param_groups for other in group["params"])


def test_what_wraps_a_layer_may_come_and_go() -> None:
    net = Digits()
    places = Places(net, prunable(net))
    places.check("here")
    net.body[3] = torch.compile(net.body[3], backend="eager")
    places.check("here")
    net.body[3] = net.body[3]._orig_mod
    places.check("here")
    net.body.append(nn.Linear(2, 2))  # an added one is not ours
    places.check("here")


def test_a_frozen_layer_that_begins_to_train_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Digits()
    net.body[3].requires_grad_(False)
    session, optimizer = Session(net, {"mask": RANDOM, "tweaks": []}), torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO, "tost_plugins"), session.drive(optimizer, total_steps=6):
        for number, batch in enumerate(digits(6)):
            net.body[3].requires_grad_(number >= 2)
            step(net, optimizer, batch)
    (line,) = [r.getMessage() for r in caplog.records if "did not at the start" in r.getMessage()]
    assert line.startswith("step 2: ") and "body.3" in line
    assert "body.3.weight" not in session.mask and bool(net.body[3].weight.all())


# ---- names that are taken


class SelfMasked(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("weight_mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_mask, self.bias)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "parameter"])
def test_a_mask_of_the_layers_own_is_neither_overwritten_nor_deleted(kind: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), SelfMasked(8, 2) if kind == "buffer" else nn.Linear(8, 2))
    if kind == "attribute":
        net[2].weight_mask = torch.ones(2, 8)
    if kind == "parameter":
        net[2].register_parameter("weight_mask", nn.Parameter(torch.ones(2, 8)))
    x, own = torch.randn(3, 8), net[2].weight_mask.clone()
    before, out = copy.deepcopy(net.state_dict()), net(x)
    with pytest.raises(TostError, match=r"^attach: expected a layer 2 \(\w+\) without a weight_mask"):
        Session(net, {"mask": RANDOM, "tweaks": ["soft_activation"]}).attach()
    assert net.state_dict().keys() == before.keys() and torch.equal(net(x), out)
    session = Session(net, {"mask": {**RANDOM, "ignore": ["2"]}, "tweaks": []})
    with session.drive(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1):
        pass
    assert torch.equal(net[2].weight_mask, own) and net.state_dict().keys() == before.keys()


# ---- tied weights


class Language(nn.Module):
    """A head that is tied to the embedding, whichever of the two comes first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {"table": nn.Embedding(12, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 12, bias=False)}
        made["head"].weight = made["table"].weight
        for name in sorted(made, key=lambda name: name != first):
            setattr(self, name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(self.table(x).mean(1))))


@pytest.mark.parametrize(
    "tweaks", [[], [{"kind": "rescaled_init", "iterations": 3, "norm": 1000.0, "look_ahead": 5.0}]]
)
def test_a_tied_network_is_one_network_whatever_comes_first(tweaks: list) -> None:
    batches = [(torch.randint(12, (8, 3)), torch.randint(12, (8,))) for _ in range(2)]
    mask = Mask({"head.weight": torch.rand(12, 8) > 0.8, "mid.weight": torch.rand(8, 8) > 0.8})
    ends = []
    for first in ("table", "head"):
        net = Language(first)
        session = Session(net, {"mask": RANDOM, "tweaks": tweaks}, mask=mask).attach()
        average, optimizer = AveragedModel(net), torch.optim.SGD(net.parameters(), lr=0.1)
        with session.drive(optimizer, batches, F.cross_entropy, total_steps=2):
            for batch in batches:
                step(net, optimizer, batch)
                average.update_parameters(net)
        plain = session.plain(average)
        assert plain.table.weight is plain.head.weight and plain.table.weight is not net.table.weight
        assert not plain.head.weight.detach()[~mask["head.weight"]].any()
        ends.append((net.head.weight.detach(), plain.head.weight.detach()))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


# ---- optimizers of named parameters


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.AdamW])
def test_names_stand_beside_their_parameters(made: Any, early: bool) -> None:
    net = Digits()
    session = Session(net, {"mask": RANDOM, "tweaks": ["ghost_skip"]})
    if not early:
        session.attach()
    decay = [(name, param) for name, param in net.named_parameters() if param.ndim > 1]
    rest = [(name, param) for name, param in net.named_parameters() if param.ndim <= 1]
    optimizer = made([{"params": decay, "weight_decay": 0.1}, {"params": rest}], lr=0.01)

    def pairs() -> list[tuple[str, str]]:
        own = {param: name for name, param in net.named_parameters()}
        groups = [zip(g["params"], g["param_names"], strict=True) for g in optimizer.param_groups]
        return [(own[param], name) for group in groups for param, name in group]

    with session.drive(optimizer, total_steps=2):
        assert all(own == name for own, name in pairs()) and any("ghost" in name for _, name in pairs())
        step(net, optimizer, digits(1)[0])
    assert all(own == name for own, name in pairs()) and not any("ghost" in name for _, name in pairs())


# ---- gradual, with a map


@pytest.mark.parametrize("initial", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_gradual_reaches_a_map_in_step(initial: float, share: float) -> None:
    net, seen = Digits(), []
    last = "body.0.weight"
    mask = {
        "kind": "gradual",
        "sparsity": 0.6,
        "initial": initial,
        "every": "1ba",
        "until": "6ba",
        "allocation": {last: share},
    }
    session, optimizer = Session(net, {"mask": mask, "tweaks": []}), torch.optim.SGD(net.parameters(), lr=0.01)
    with session.drive(optimizer, total_steps=8):
        for batch in digits(8):
            seen.append((session.mask.sparsity, session.mask.sparsities()[last]))
            step(net, optimizer, batch)
    seen.append((session.mask.sparsity, session.mask.sparsities()[last]))
    size = session.mask[last].numel()
    assert seen[0][0] == pytest.approx(initial, abs=0.01) and seen[-1][0] == pytest.approx(0.6, abs=0.001)
    assert seen == sorted(seen) and all(own == pytest.approx(s * share / 0.6, abs=1 / size) for s, own in seen)


# ---- checkpoints


@pytest.mark.parametrize("kind", ["random", "gradual"])
def test_what_a_checkpoint_brings_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def attached(sparsity: float) -> tuple[Session, torch.optim.Optimizer]:
        mask = {"kind": kind, "sparsity": sparsity}
        net = Digits()
        return Session(net, {"mask": mask, "tweaks": []}).attach(), torch.optim.SGD(net.parameters(), lr=0.1)

    session, optimizer = attached(0.5)
    session.start(optimizer, total_steps=4)
    step(session.model, optimizer, digits(1)[0])
    session.after_step()
    saved = copy.deepcopy(session.model.state_dict())
    for sparsity, total, words in ((0.5, 4, ""), (0.9, 100, "total_steps 100")):
        session, optimizer = attached(sparsity)
        session.model.load_state_dict(saved)
        caplog.clear()
        with caplog.at_level(logging.INFO, "tost_plugins"):
            session.start(optimizer, total_steps=total)
        (line,) = [
            record for record in caplog.records if "goes on from a checkpoint: step 1 of 4" in record.getMessage()
        ]
        assert (line.levelno == logging.WARNING) == bool(words) and words in line.getMessage()
        assert ("not used: sparsity 0.9" in line.getMessage()) == (bool(words) and kind == "random")


def test_a_checkpoint_with_masks_of_layers_that_are_frozen_now_loads_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Digits()
    Session(net, {"mask": RANDOM, "tweaks": []}).attach().start(
        torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4
    )
    saved, net = copy.deepcopy(net.state_dict()), Digits()
    net.body[0].requires_grad_(False)
    session = Session(net, {"mask": RANDOM, "tweaks": []}).attach()
    with caplog.at_level(logging.INFO, "tost_plugins"):
        net.load_state_dict(saved, strict=True)
    assert "1 masks are of layers that have none here, and are left out: body.0.weight_mask" in caplog.text
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4)
    assert "body.0.weight" not in session.mask and bool((net.body[0].weight == 0).any())


def test_a_checkpoint_from_before_the_hubs_conv1d_had_masks_goes_on_with_them_dense(
    caplog: pytest.LogCaptureFixture,
) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def attached() -> Session:
        net = nn.Sequential(conv1d(8, 4), nn.Linear(8, 2))
        session = Session(
            net, {"mask": {"kind": "rigl", "sparsity": 0.5, "allocation": "uniform"}, "tweaks": []}
        ).attach()
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4)
        return session

    saved = {
        k: v
        for k, v in copy.deepcopy(attached().model.state_dict()).items()
        if k not in ("0.weight_mask", "0.weight_seen")
    }
    session = attached()
    with caplog.at_level(logging.INFO, "tost_plugins"):
        session.model.load_state_dict(saved, strict=True)
    assert "without masks for 1 Conv1D layers, which stay dense: 0" in caplog.text
    assert session.mask.sparsities() == {"0.weight": 0.0, "1.weight": 0.5}
