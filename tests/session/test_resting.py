"""Tweaks rest in runs too short for them, and runs say what else is too short: masks that stand still, or are not there yet."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tost_plugins import Recipe, Session, TostError

MASK = {"kind": "magnitude", "sparsity": 0.5}
STEPS = 12
_GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(6, 3, 6, 6, generator=_GENERATOR), torch.arange(6) % 3) for _ in range(STEPS)]
SKIP = {"kind": "ghost_skip", "until": "8ba", "least_steps": 10}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(F.relu(self.stem(x))))).mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def made(*tweaks: Any, mask: Any = MASK, model: nn.Module | None = None) -> tuple[nn.Module, Session, Any]:
    model = Net() if model is None else model
    session = Session(model, {"mask": mask, "tweaks": list(tweaks)}).attach()
    return model, session, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS) -> None:
    for x, y in DATA[first:last]:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_that_is_too_short_is_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tost_plugins")
    runs = []
    for tweaks in ([SKIP | {"least_steps": 13}, {"kind": "soft_activation", "until": "8ba", "least_steps": 13}], []):
        model, session, optimizer = made(*tweaks)
        session.begin(optimizer, DATA, total_steps=STEPS)
        assert session.metrics()["tost/ghost_parameters"] == 0 and session.is_plain
        train(model, optimizer)
        runs.append((model, session.finish(), [len(group["params"]) for group in optimizer.param_groups]))
    (model, report, held), (plain, other, own) = runs
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert held == own and report.active_parameters == other.active_parameters
    assert (
        "no tweaks; left out: ghost_skip (12 steps are fewer than its least_steps, 13), soft_activation (12"
        in caplog.text
    )


def test_one_that_is_as_long_acts_and_so_does_one_of_unknown_length() -> None:
    for steps in (10, None):
        _, session, optimizer = made(SKIP)
        session.begin(optimizer, DATA, total_steps=steps)
        assert session.metrics()["tost/ghost_skip/alpha"] == 1 and not session.left_out


def test_the_default_rests_in_short_runs_and_not_in_long_ones() -> None:
    always, all_five = ["multiplicative"], [tweak.kind for tweak in Recipe.of(None).tweaks]
    for steps, kinds in ((300, always), (1_250, ["ghost_skip", *always]), (2_500, all_five)):
        model = Net()
        session = Session(model, Recipe.of(None))
        session.criterion(F.cross_entropy)
        session.begin(torch.optim.SGD(model.parameters(), lr=0.1), DATA, F.cross_entropy, total_steps=steps)
        assert [tweak.kind for tweak in session.tweaks] == kinds


def test_what_rests_has_its_numbers_in_a_checkpoint() -> None:
    model, session, optimizer = made(SKIP | {"least_steps": 100})
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(model, optimizer, 0, 6)
    states = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, optimizer, 6)

    again, other, own = made(SKIP | {"least_steps": 100})
    set_state_dict(again, own, model_state_dict=states[0], optim_state_dict=states[1])
    other.begin(own, DATA, total_steps=STEPS)
    train(again, own, 6)
    session.finish(), other.finish()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_run_that_turns_out_to_be_longer_has_its_tweaks_back() -> None:
    model, session, optimizer = made(SKIP, mask={"kind": "snip", "sparsity": 0.5})
    with pytest.raises(TostError, match="batches"):
        session.begin(optimizer, None, total_steps=5)
    session.begin(optimizer, DATA, total_steps=STEPS)
    assert session.metrics()["tost/ghost_skip/alpha"] == 1 and not session.left_out

    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(model.state_dict())
    other, late, own = made(SKIP, mask={"kind": "snip", "sparsity": 0.5})
    late.begin(own, DATA, total_steps=5)
    assert late.left_out
    other.load_state_dict(saved)
    train(other, own, 4, 5)
    assert late.clock.step == 5 and late.metrics()["tost/ghost_skip/alpha"] == 1 - 5 / 8 and not late.left_out


def test_a_wrapper_may_call_its_network_module() -> None:
    model, session, optimizer = made({"kind": "soft_activation", "until": "4ba"}, model=Wrapper(Net()))
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(model, optimizer)
    session.finish()
    assert list(model.state_dict()) == list(Wrapper(Net()).state_dict())


def test_a_copy_of_an_attached_model_ends_without_hooks() -> None:
    model, _, _ = made()
    twin, session, optimizer = made(model=copy.deepcopy(model))
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(twin, optimizer)
    session.finish()
    assert not twin._load_state_dict_pre_hooks and not twin._load_state_dict_post_hooks


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("edge_popup", "set"),
        ("set", "snfs"),
        ("magnitude", "ac_dc"),
        ("rigl", "magnitude"),
        ("rigl", "set"),
        ("set", "rigl"),
        ("gradual", "ac_dc"),
        ("selfish", "set"),
    ],
)
def test_a_checkpoint_of_another_kind_of_mask_is_refused_in_one_line(there: str, here: str) -> None:
    model, session, optimizer = made(mask={"kind": there, "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=STEPS, steps_per_epoch=4)
    train(model, optimizer, 0, 2)
    other, _, _ = made(mask={"kind": here, "sparsity": 0.5})
    with pytest.raises(TostError, match="checkpoint: expected one of a run with the recipe's kind of mask"):
        other.load_state_dict(model.state_dict())


def test_a_checkpoint_that_names_its_kind_says_it() -> None:
    model, session, optimizer = made(mask={"kind": "rigl", "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(model, optimizer, 0, 2)
    other, late, own = made(mask={"kind": "set", "sparsity": 0.5})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        TostError, match=r"recipe's kind of mask \(set\), got one of rigl; resume with the recipe that the run"
    ):
        other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with torch.no_grad():  # as a framework does that loads tensor by tensor
        for name, value in other.state_dict().items():
            value.copy_(model.state_dict()[name])
    with pytest.raises(TostError, match=r"recipe's kind of mask \(set\), got one of rigl"):
        late.begin(own, DATA, total_steps=STEPS)


@pytest.mark.parametrize(("there", "here"), [("random", "eoi"), ("eoi", "random")])
def test_a_checkpoint_of_a_mask_found_otherwise_goes_on_and_says_so(there: str, here: str, caplog: Any) -> None:
    model, session, optimizer = made(mask={"kind": there, "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(model, optimizer, 0, 2)
    other, late, own = made(mask={"kind": here, "sparsity": 0.5})
    other.load_state_dict(model.state_dict())
    late.begin(own, DATA, total_steps=STEPS)
    assert caplog.text.count(f"a mask of sparsity 0.5000; not used: mask {here}") == 1
    assert late.mask == session.mask and late.clock.step == 2


@pytest.mark.parametrize("kind", ["set", "random"])
def test_a_checkpoint_from_before_kinds_were_written_goes_on(kind: str, caplog: Any) -> None:
    model, session, optimizer = made(mask={"kind": kind, "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=STEPS)
    train(model, optimizer, 0, 2)
    other, late, own = made(mask={"kind": kind, "sparsity": 0.5})
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name != "tost_kind"})
    late.begin(own, DATA, total_steps=STEPS)
    assert late.mask == session.mask and late.clock.step == 2 and "not used" not in caplog.text


def test_a_mask_that_does_not_move_is_said_and_one_that_is_not_there_yet(caplog: pytest.LogCaptureFixture) -> None:
    _, session, optimizer = made(mask={"kind": "rigl", "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=STEPS)
    assert "mask rigl: does not move in a run of 12 steps; set a shorter `every`" in caplog.text

    model, session, optimizer = made(mask={"kind": "ac_dc", "sparsity": 0.5})
    session.begin(optimizer, DATA, total_steps=100)
    train(model, optimizer, 0, 3)
    session.finish()
    size = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim > 1)
    said = f"finish at step 3: the network keeps {size} of {size} weights, where a sparsity of 0.5 keeps {size // 2}"
    assert said in caplog.text
