"""Lottery tickets: what is pruned, that a rewind rewinds everything, in every trainer, and that a killed one goes on."""

import csv
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from tost_plugins import LotteryTicket, Mask, Session, TostError, masks
from tost_plugins.lab.cli import app
from tost_plugins.lab.compare import compare
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.lottery import lottery
from tost_plugins.lab.train import train
from tost_plugins.lottery.round import Round
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import session_of
from tost_plugins.training.params import clean_name, prunable

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = ("torch", "composer", "transformers", "accelerate", "lightning")
#: Two epochs of 3 steps in each of 3 rounds; the rewind is to the middle of an epoch.
STEPS, REWIND, ROUNDS = 6, 2, 3
TICKET = {"kind": "lottery_ticket", "sparsity": 0.7, "prune": 0.5, "rewind": f"{REWIND}ba"}
RECIPE: dict[str, Any] = {
    "name": "tickets",
    "mask": TICKET,
    "tweaks": [{"kind": "ghost_skip", "until": "0.5dur"}, {"kind": "label_smoothing"}],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 192, "batch_size": 64, "validation": 100},
    "optimizer": {"lr": 0.05, "nesterov": True},
    "schedule": {"kind": "cosine"},
    "duration": "2ep",
}
EIGHT = torch.tensor([0.5, -9.0, 0.1, 2.0, -0.2, -1.0, 0.0, 0.3])

Tensors = dict[str, Tensor]


def recipe(trainer: str = "torch", **changes: Any) -> Recipe:
    """The recipe for a trainer; skips the test where that, or the data, is not installed."""
    pytest.importorskip("sklearn")
    if trainer != "torch":
        pytest.importorskip(trainer)
    return Recipe.from_dict({**RECIPE, "trainer": trainer, **changes})


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def masked(tensors: Tensors, mask: Mask) -> Tensors:
    return {name: value * mask[name] if name in mask else value for name, value in tensors.items()}


def ends(out: Path) -> dict[str, Any]:
    """What the rounds have left: masks, networks, histories and the table."""
    names = ("*/model.safetensors", "*/history.jsonl", "lottery.csv")
    found = {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(name)}
    return found | {path.parent.name: Mask.load(path) for path in out.glob("*/mask.safetensors")}


# ---- what is pruned


def test_the_sparsities_of_the_rounds() -> None:
    assert LotteryTicket(sparsity=0).sparsities() == [0.0]
    assert LotteryTicket(sparsity=0.1).sparsities() == [0.0, 0.1]
    assert LotteryTicket(sparsity=0.2).sparsities() == [0.0, 0.2]
    assert LotteryTicket(sparsity=0.5).sparsities() == pytest.approx([0, 0.2, 0.36, 0.488, 0.5])
    assert LotteryTicket(sparsity=0.75, prune=0.5).sparsities() == [0.0, 0.5, 0.75]
    assert LotteryTicket(sparsity=0.36).sparsities() == [0.0, pytest.approx(0.2), 0.36]
    assert len(LotteryTicket(sparsity=0.9999).sparsities()) == 43


def test_the_smallest_magnitudes_go_and_none_returns() -> None:
    ticket, dense = LotteryTicket(sparsity=0.75, prune=0.5), Mask({"w": torch.ones(8)})
    half = ticket.next(dense, {"w": EIGHT}, 0.5)
    assert half["w"].tolist() == [1, 1, 0, 1, 0, 1, 0, 0]
    # what is pruned stays so, whatever stands in its place; of equal ones those with the lower index stay
    later = ticket.next(half, {"w": torch.tensor([-1.0, 0.5, 99, 1, 99, 1, 99, 99])}, 0.75)
    assert later["w"].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    # a survivor that has become 0 comes before what is pruned
    assert ticket.next(half, {"w": torch.zeros(8)}, 0.625)["w"].tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    with pytest.raises(TostError, match=r"expected a sparsity of at least 0\.75, got 0\.5; pruned weights stay so"):
        ticket.next(later, {"w": EIGHT}, 0.5)
    with pytest.raises(TostError, match="expected finite scores, got NaN or infinity in w"):
        ticket.next(dense, {"w": EIGHT / 0}, 0.5)


SMALL_AND_LARGE = {"small": torch.tensor([0.1, -0.2, 0.4, 0.3]), "large": torch.tensor([-1.3, 1.1, 1.0, -1.2])}


@pytest.mark.parametrize(
    ("settings", "small", "large"),
    [
        ({"allocation": "uniform"}, [0, 0, 1, 1], [1, 0, 0, 1]),
        ({"on_collapse": "keep_one"}, [0, 0, 1, 0], [1, 1, 0, 1]),
    ],
)
def test_global_compares_layers_and_uniform_takes_the_same_share_of_each(
    settings: dict[str, Any], small: list[int], large: list[int]
) -> None:
    dense = Mask.dense(SMALL_AND_LARGE)
    mask = LotteryTicket(sparsity=0.5, **settings).next(dense, SMALL_AND_LARGE, 0.5)
    assert (mask["small"].tolist(), mask["large"].tolist()) == (small, large)
    empty = LotteryTicket(sparsity=0.5).next(
        dense, SMALL_AND_LARGE, 0.5
    )  # whether it connects is seen by who trains with it
    assert (int(empty["small"].sum()), int(empty["large"].sum())) == (0, 4)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_counts_are_exact_and_masks_nested_over_many_rounds(allocation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 7), "b": (11,), "c": (5, 5, 3), "d": (2, 2)}
    ticket = LotteryTicket(sparsity=0.8, prune=0.07, allocation=allocation, on_collapse="keep_one")  # type: ignore[arg-type]
    mask = Mask.dense({name: torch.zeros(shape) for name, shape in shapes.items()})
    for sparsity in ticket.sparsities()[1:]:
        weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        before, mask = mask, ticket.next(mask, weights, sparsity)
        assert mask.kept == round((1 - sparsity) * mask.size)
        assert not any((keep & ~before[name]).any() for name, keep in mask.items())


# ---- a rewind rewinds everything


class Watch:
    """What network and optimizer are before each training step, round by round, seen by torch's hook on every forward."""

    def __init__(self) -> None:
        self.rounds: list[list[dict[str, Any]]] = []

    def listen(self, event: str, values: dict[str, Any]) -> None:
        if event == "run":
            self.rounds.append([])

    def forward(self, module: nn.Module, args: Any) -> None:
        session = session_of(module)
        if session is not None and session.state == "running" and module.training:
            assert session.optimizers is not None
            self.rounds[-1].append(state(module, session.optimizers.inner[0]))


def state(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Copies of weights, momentum and batch-norm buffers by name, and the learning rate."""
    moments = {name: optimizer.state[param].get("momentum_buffer") for name, param in net.named_parameters()}
    norms = {name: value for name, value in net.named_buffers() if "running" in name or "batches" in name}
    parts = {"weights": dict(net.named_parameters()), "momentum": moments, "norms": norms}
    copies = {
        part: {clean_name(name): value.detach().clone() for name, value in tensors.items() if value is not None}
        for part, tensors in parts.items()
    }
    return {**copies, "lr": optimizer.param_groups[0]["lr"]}


@contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    hook = register_module_forward_pre_hook(watch.forward)
    try:
        yield watch
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trainer -> folder, rows and what was seen of all its rounds."""
    done: dict[str, tuple[Path, list[dict[str, Any]], Watch]] = {}

    def run(trainer: str) -> tuple[Path, list[dict[str, Any]], Watch]:
        if trainer not in done:
            out = tmp_path_factory.mktemp(trainer) / "tickets"
            with watching() as watch:
                rows = lottery(recipe(trainer), out, listen=watch.listen)
            done[trainer] = out, rows, watch
        return done[trainer]

    return run


def assert_rewound(out: Path, watch: Watch, first: int, steps: int) -> None:
    """Each later round begins as the first one was after `first` steps, masked, and has the learning rates from there."""
    dense = watch.rounds[0]
    for number, seen in enumerate(watch.rounds[1:], start=1):
        mask, early, start = Mask.load(out / f"round-{number:02d}/mask.safetensors"), dense[first], seen[0]
        assert mask.sparsity > 0.4
        assert same(start["weights"], masked(early["weights"], mask))
        assert same(start["momentum"], masked(early["momentum"], mask))
        assert same(start["norms"], early["norms"])
        assert [state["lr"] for state in seen] == [state["lr"] for state in dense[first:]]
        assert len(seen) == steps - first
        for state in seen:
            assert same(state["weights"], masked(state["weights"], mask))
            assert same(state["momentum"], masked(state["momentum"], mask))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_round_starts_from_the_early_state(whole: Any, trainer: str) -> None:
    out, _, watch = whole(trainer)
    assert [len(seen) for seen in watch.rounds] == [STEPS, STEPS - REWIND, STEPS - REWIND]
    assert_rewound(out, watch, REWIND, STEPS)
    begin, early, end = (watch.rounds[0][step] for step in (0, REWIND, STEPS - 1))
    for other in (begin, end):  # that would show if nothing were rewound, or too far
        assert other["lr"] != early["lr"]
        for part in ("weights", "momentum", "norms"):
            assert not same(other[part], early[part])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_round_starts_from_the_initial_state_by_default(tmp_path: Path, trainer: str) -> None:
    spec = recipe(trainer, mask={**TICKET, "rewind": "0ba", "sparsity": 0.5}, duration="4ba")
    with watching() as watch:
        lottery(spec, tmp_path, listen=watch.listen)
    assert len(watch.rounds) == 2 and watch.rounds[1][0]["momentum"] == {}
    assert_rewound(tmp_path, watch, 0, 4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_mask_a_round_and_a_line_a_round(whole: Any, trainer: str) -> None:
    out, rows, _ = whole(trainer)
    found = [Mask.load(out / f"round-{number:02d}/mask.safetensors") for number in range(ROUNDS)]
    size = found[0].size
    assert [mask.kept for mask in found] == [size, round(0.5 * size), round(0.3 * size)]
    assert [row["kept_weights"] for row in rows] == [mask.kept for mask in found]
    assert [row["round"] for row in rows] == [0, 1, 2] and rows[2]["sparsity"] == found[2].sparsity
    assert list(rows[0]) == ["round", "sparsity", "kept_weights", "test_accuracy", "validation_accuracy"]
    with (out / "lottery.csv").open() as file:
        assert [list(map(float, row.values())) for row in csv.DictReader(file)] == [list(row.values()) for row in rows]
    for number in range(ROUNDS - 1):  # each mask is that of the magnitudes which the round before has ended with
        weights, pruned = load_file(out / f"round-{number:02d}/model.safetensors"), found[number] - found[number + 1]
        largest = max(float(weights[name][gone].abs().max()) for name, gone in pruned.items() if gone.any())
        assert largest <= min(float(weights[name][keep].abs().min()) for name, keep in found[number + 1].items())


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_every_trainer_finds_the_same_tickets(whole: Any, trainer: str) -> None:
    assert whole(trainer)[1] == whole("torch")[1]
    assert ends(whole(trainer)[0]) == ends(whole("torch")[0])


# ---- killed, it goes on in that round


class Crash(Exception):
    """The run dies."""


def crash_at(number: int, step: int, press: bool = False) -> Any:
    """A listener that dies when this step of this round is done, or presses Ctrl-C."""
    rounds = []

    def listen(event: str, values: dict[str, Any]) -> None:
        if event == "run":
            rounds.append(values["name"])
        if event == "step" and (len(rounds) - 1, values["step"]) == (number, step):
            if not press:
                raise Crash
            os.kill(os.getpid(), signal.SIGINT)

    return listen


def go_on(spec: Recipe, out: Path) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Resume; the rows, and which (round, step) were done."""
    done: list[tuple[int, int]] = []
    names: list[str] = []

    def listen(event: str, values: dict[str, Any]) -> None:
        if event == "run":
            names.append(values["name"])
        if event == "step":
            done.append((int(names[-1].split(" round ")[1].split(" of ")[0]), values["step"]))

    return lottery(spec, out, resume=True, listen=listen), done


def steps(number: int, first: int) -> list[tuple[int, int]]:
    return [(number, step) for step in range(first, STEPS + 1)]


#: Where it dies -> what is done after that: a checkpoint is there after each epoch (3 steps), and at the rewind.
KILLS = {
    (0, 1): [*steps(0, 1), *steps(1, 3), *steps(2, 3)],
    (0, 3): [*steps(0, 3), *steps(1, 3), *steps(2, 3)],
    (0, 4): [*steps(0, 4), *steps(1, 3), *steps(2, 3)],
    (1, 3): [*steps(1, 3), *steps(2, 3)],
    (1, 5): [*steps(1, 4), *steps(2, 3)],
    (2, 6): [*steps(2, 4)],
}


@pytest.mark.parametrize(
    ("trainer", "moment"),
    [("torch", moment) for moment in KILLS] + [(other, (1, 5)) for other in TRAINERS[1:]],
    ids=lambda value: value if isinstance(value, str) else f"round{value[0]}-step{value[1]}",
)
def test_killed_in_a_round_it_goes_on_in_that_round(
    whole: Any, tmp_path: Path, trainer: str, moment: tuple[int, int]
) -> None:
    out, rows, _ = whole(trainer)
    with pytest.raises(Crash):
        lottery(recipe(trainer), tmp_path, listen=crash_at(*moment))
    again, done = go_on(recipe(trainer), tmp_path)
    assert done == KILLS[moment]
    assert again == rows and ends(tmp_path) == ends(out)
    assert go_on(recipe(trainer), tmp_path) == (rows, [])


def test_killed_before_the_early_state_was_put_away(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        lottery(recipe(), tmp_path, listen=crash_at(0, REWIND + 1))
    (tmp_path / "round-00/early").rename(tmp_path / "round-00/early.tmp")  # as it is called while it is copied
    assert go_on(recipe(), tmp_path)[0] == whole("torch")[1]
    assert ends(tmp_path) == ends(whole("torch")[0])


def test_ctrl_c_in_a_round(whole: Any, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped, match=f"stopped at step 4 of {STEPS}"):
            lottery(recipe(), tmp_path, listen=crash_at(1, 4, press=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert go_on(recipe(), tmp_path) == (whole("torch")[1], [*steps(1, 5), *steps(2, 3)])
    assert ends(tmp_path) == ends(whole("torch")[0])


def test_a_used_folder_and_another_recipe_are_refused(whole: Any) -> None:
    out, _, _ = whole("torch")
    before = ends(out)
    with pytest.raises(TostError, match="expected a new folder, got one that holds a run; add --resume"):
        lottery(recipe(), out)
    with pytest.raises(TostError, match=r"expected the recipe that .* was started with, got another one"):
        lottery(recipe(seed=5), out, resume=True)
    assert ends(out) == before


# ---- a given mask stands above that of a checkpoint


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_given_mask_replaces_the_one_of_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tost_plugins")
    spec = {"mask": {"kind": "random", "sparsity": 0.5}}
    net = small()
    session, made = Session(net, spec), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    session.attach().start(made, total_steps=4)
    net(torch.randn(4, 6)).sum().backward()
    made.step()
    session.after_step()
    saved, state = net.state_dict(), made.state_dict()
    other = masks.find(small(1), "random", 0.7, seed=3)
    for given, replaced in ((other, True), (session.mask, False)):
        caplog.clear()
        twin = small(2)
        resumed, optimizer = (
            Session(twin, spec, given).attach(),
            torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9),
        )
        twin.load_state_dict(saved)
        optimizer.load_state_dict(state)
        resumed.start(optimizer, total_steps=4)
        assert resumed.mask == given and resumed.clock.step == 1
        assert ("the given mask (sparsity 0.7" in caplog.text) == replaced
        for name, param in prunable(twin).items():
            assert torch.equal(param, saved[name] * given[name]) and torch.equal(
                twin.state_dict()[f"{name}_mask"], given[name]
            )
            momentum = optimizer.state[param]["momentum_buffer"]
            assert not momentum[~given[name]].any() and momentum.any()


# ---- around a training function of one's own


class Own:
    """A training function as users write it: momentum, a cosine, noise from torch's generator; it notes what it sees."""

    def __init__(self, crash: tuple[int, int] | None = None, kept: tuple[Any, ...] = ()) -> None:
        self.watch, self.crash, self.kept = Watch(), crash, kept
        self.done: list[tuple[int, int]] = []

    def __call__(self, model: nn.Module, round: Round) -> dict[str, float]:
        optimizer, schedule = self.kept or sgd_and_cosine(model)
        self.watch.rounds.append([])
        for step in round.steps(STEPS, optimizer, schedule):
            self.watch.rounds[-1].append(state(model, optimizer))
            x = torch.randn(16, 6)
            loss = F.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.done.append((round.number, step + 1))
            if self.done[-1] == self.crash:
                raise Crash
        return {"loss": loss.item()}


def sgd_and_cosine(model: nn.Module) -> tuple[Optimizer, CosineAnnealingLR]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    return optimizer, CosineAnnealingLR(optimizer, STEPS)


def ticket(**changes: Any) -> LotteryTicket:
    return LotteryTicket(**{key: value for key, value in {**TICKET, **changes}.items() if key != "kind"})


@pytest.mark.parametrize("rewind", [0, REWIND])
@pytest.mark.parametrize("kept", [False, True], ids=["made in each round", "kept over the rounds"])
def test_a_function_of_ones_own_is_rewound(tmp_path: Path, rewind: int, kept: bool) -> None:
    net = small()
    own = Own(kept=sgd_and_cosine(net) if kept else ())
    rows = ticket(rewind=f"{rewind}ba").run(net, own, tmp_path)
    assert_rewound(tmp_path, own.watch, rewind, STEPS)
    assert [row["kept_weights"] for row in rows] == [64, 32, 19] and list(rows[0])[-1] == "loss"
    last = Mask.load(tmp_path / "round-02/mask.safetensors")
    assert Mask.from_zeros(prunable(net)) == last
    assert len((tmp_path / "lottery.csv").read_text().splitlines()) == 1 + ROUNDS


@pytest.mark.parametrize("save_every", [None, 3])
@pytest.mark.parametrize("moment", [(0, 2), (0, 5), (1, 3), (1, 5), (2, 4)])
def test_a_function_of_ones_own_goes_on(tmp_path: Path, moment: tuple[int, int], save_every: int | None) -> None:
    net, other = small(), small()  # each seeds torch's generator
    random_state = torch.get_rng_state()
    rows = ticket().run(net, Own(), tmp_path / "whole")
    torch.set_rng_state(random_state)
    with pytest.raises(Crash):
        ticket().run(other, Own(crash=moment), tmp_path / "killed", save_every=save_every)
    torch.manual_seed(8)  # another process, with another model and another random state
    resumed, own = small(9), Own()
    assert ticket().run(resumed, own, tmp_path / "killed", resume=True, save_every=save_every) == rows
    assert same(resumed.state_dict(), net.state_dict())
    masks_of = [Mask.load(tmp_path / run / "round-02/mask.safetensors") for run in ("whole", "killed")]
    assert masks_of[0] == masks_of[1] == Mask.from_zeros(prunable(resumed))
    number, step = moment
    begin = 3 if save_every and step > 3 else REWIND if number else 0
    assert own.done[0] == (number, begin + 1)
    again = small(7)
    assert ticket().run(again, Own(), tmp_path / "killed", resume=True) == rows and same(
        again.state_dict(), net.state_dict()
    )


def test_every_round_begins_with_the_same_random_state(tmp_path: Path) -> None:
    draws = []

    def draw(model: nn.Module, round: Round) -> None:
        draws.append(torch.rand(3))

    ticket(rewind="0ba").run(small(), draw, tmp_path)
    assert len(draws) == ROUNDS and all(torch.equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_trainers_of_a_framework_take_the_mask(tmp_path: Path, trainer: str) -> None:
    pytest.importorskip(trainer)
    net, x = Classifier(), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 4)
    begins: list[Tensors] = []

    def one(model: nn.Module, round: Round) -> None:
        begins.append({name: value.clone() for name, value in model.state_dict().items()})
        WITH[trainer](model, round.mask, data, tmp_path / "trainer")

    rows = ticket(rewind="0ba").run(net, one, tmp_path)
    for number, begin in enumerate(begins):
        mask = Mask.load(tmp_path / f"round-{number:02d}/mask.safetensors")
        assert same(begin, masked(begins[0], mask))
    assert Mask.from_zeros(prunable(net)) == mask and rows[-1]["kept_weights"] == mask.kept == 19
    assert not same(net.state_dict(), begins[-1])


class Classifier(nn.Module):
    """Called by keywords, it returns its loss as the models of the Hub do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)} if labels is not None else logits


def with_composer(model: nn.Module, mask: Mask, data: Any, folder: Path) -> None:
    from composer import Trainer
    from composer.models import ComposerClassifier

    from tost_plugins import TostAlgorithm

    net = ComposerClassifier(model, num_classes=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    tost = TostAlgorithm(mask=mask, tweaks=[])
    Trainer(model=net, train_dataloader=data, max_duration="1ep", optimizers=optimizer, algorithms=[tost],
            device="cpu", progress_bar=False).fit()  # fmt: skip


def with_transformers(model: nn.Module, mask: Mask, data: Any, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from tost_plugins import TostCallback

    args = TrainingArguments(str(folder), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
                             per_device_train_batch_size=4, remove_unused_columns=False)  # fmt: skip
    samples = [{"x": x, "labels": label} for x, label in data.dataset]
    Trainer(model=model, args=args, train_dataset=samples, callbacks=[TostCallback(mask=mask, tweaks=[])]).train()


def with_accelerate(model: nn.Module, mask: Mask, data: Any, folder: Path) -> None:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    accelerator = Accelerator(cpu=True)
    tost = TostHook(None, accelerator, mask=mask, tweaks=[])
    tost.attach(model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    tost.start(optimizer, data, total_steps=4)
    for x, labels in data:
        accelerator.backward(prepared(x, labels)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    tost.finish()


def with_lightning(model: nn.Module, mask: Mask, data: Any, folder: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from tost_plugins import TostLightning

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.module(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    Trainer(max_epochs=1, callbacks=[TostLightning(mask=mask, tweaks=[])], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(Module(), data)  # fmt: skip


WITH = {
    "composer": with_composer,
    "transformers": with_transformers,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/lottery.md").read_text(), re.DOTALL)
    shown: dict[str, Any] = {}
    exec(block, shown)
    assert Mask.load("tickets/round-08/mask.safetensors") == Mask.from_zeros(prunable(shown["net"]))
    assert shown["rows"][-1]["sparsity"] == pytest.approx(0.8, abs=1e-3) and len(shown["rows"]) == 9
    assert len(LotteryTicket(sparsity=0.95).sparsities()) == 1 + 14


# ---- the command, and what is refused


def tost(*args: Any) -> str:
    """Run a command in this process; a TostError comes through."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = ["--set", "data.limit=64", "--set", "duration=2ba", "--set", "mask.rewind=1ba", "--set", "mask.sparsity=0.5"]


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    args = ["lottery", "lottery_quickstart", *SMALL, "--out", tmp_path / "a"]
    rows = json.loads(tost(*args, "--json"))["rows"]
    assert [row["round"] for row in rows] == [0, 1] and rows[1]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    shown = tost(*args, "--resume")
    assert all(
        text in shown for text in ("kept weights", "test accuracy", f"{rows[1]['kept_weights']:,}", "lottery.csv")
    )
    inspected = json.loads(tost("mask", "inspect", tmp_path / "a/round-01/mask.safetensors", "--json"))
    assert inspected["kept"] == rows[1]["kept_weights"]
    trained = ["--set", f"mask={{kind: file, path: {tmp_path / 'a/round-01/mask.safetensors'}}}", "--set", "tweaks=[]"]
    result = json.loads(tost("train", "lottery_quickstart", *SMALL[:4], *trained, "--out", tmp_path / "b", "--json"))
    assert result["sparsity"] == rows[1]["sparsity"]


def test_one_run_cannot_find_a_ticket(tmp_path: Path) -> None:
    text = (
        "expected several rounds of training, got a single run; find the masks with 'tost lottery RECIPE' or "
        "LotteryTicket(...).run(...), and train with one of them as mask: {kind: file, path: .../mask.safetensors}"
    )
    with pytest.raises(TostError) as error:
        train(recipe(), tmp_path / "train")
    assert str(error.value) == f"mask lottery_ticket: {text}"
    with pytest.raises(TostError) as error:
        compare(recipe(), tmp_path / "compare", 1)
    assert str(error.value) == f"mask lottery_ticket: {text}"
    with pytest.raises(TostError) as error:
        masks.find(small(), "lottery_ticket", 0.9)
    assert str(error.value) == f"masks.find(lottery_ticket): {text}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a sparsity in \[0, 1\), got 1\.0"),
        ({"prune": 0.0}, r"prune: expected greater than or equal to 0.001, got 0\.0; correct this value"),
        ({"prune": 1.0}, r"prune: expected less than 1, got 1\.0; correct this value"),
        ({"rewind": 500}, "rewind: time: expected a number with a unit, got 500"),
        ({"allocation": "erk"}, "allocation: expected 'global' or 'uniform', got 'erk'"),
        ({"rounds": 3}, "rounds: expected no such key, got 'rounds'"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TostError, match=message):
        Recipe.from_dict({**RECIPE, "mask": {**TICKET, **changes}})


def test_recipes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        TostError, match="tost lottery: expected a recipe whose mask is a lottery_ticket, got 'snip'; write"
    ):
        lottery(recipe(mask={"kind": "snip", "sparsity": 0.9}), tmp_path)
    with pytest.raises(
        TostError, match=rf"rewind: expected a moment before the end of the run \({STEPS} steps\), got '2ep'"
    ):
        lottery(recipe(mask={**TICKET, "rewind": "2ep"}), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        TostError,
        match=r"round 1: the given mask: expected a path of kept weights from the inputs to the outputs, got none: the last",
    ):
        lottery(recipe(mask={**TICKET, "sparsity": 0.9995, "prune": 0.9999}, duration="3ba"), tmp_path)
    assert len((tmp_path / "lottery.csv").read_text().splitlines()) == 2


def forgets_the_mask(model: nn.Module, round: Round) -> None:
    for param in prunable(model).values():
        nn.init.normal_(param)


def forgets_the_steps(model: nn.Module, round: Round) -> None:
    pass  # it is masked from the start


def returns_a_number(model: nn.Module, round: Round) -> Any:
    return 0.93


def loops_twice(model: nn.Module, round: Round) -> None:
    for _ in range(2):
        list(round.steps(3, sgd_and_cosine(model)[0]))


def trains_too_little(model: nn.Module, round: Round) -> None:
    list(round.steps(3, torch.optim.SGD([model[0].weight], lr=0.1)))  # type: ignore[index]


def forgets_the_schedule(model: nn.Module, round: Round) -> None:
    list(round.steps(3, *sgd_and_cosine(model)[: 1 if round.number else 2]))


@pytest.mark.parametrize(
    ("function", "rewind", "message"),
    [
        (
            forgets_the_mask,
            "0ba",
            "round 1: expected zeros outside the mask after training, got others in 0.weight; loop over",
        ),
        (forgets_the_steps, "2ba", "round 0: expected the state at '2ba' to be kept, got none; loop over"),
        (returns_a_number, "0ba", r"round 0: expected a dict of numbers or None .*, got 0\.93; return {'accuracy'"),
        (loops_twice, "0ba", "round.steps: expected one loop in a round, got a second"),
        (
            trains_too_little,
            "0ba",
            "optimizer: expected one that trains every prunable weight of the model, got one without",
        ),
        (forgets_the_schedule, "2ba", "round.steps: expected the 3 parts with a state that the dense round had, got 2"),
        (forgets_the_schedule, "3ba", r"rewind: expected a moment before the end of the run \(3 steps\), got '3ba'"),
        (forgets_the_schedule, "1ep", "expected a run of known length, got steps_per_epoch=None"),
    ],
)
def test_functions_that_do_not_fit(tmp_path: Path, function: Any, rewind: str, message: str) -> None:
    with pytest.raises(TostError, match=message) as error:
        ticket(rewind=rewind).run(small(), function, tmp_path)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_folders_of_other_tickets_are_left_alone(tmp_path: Path) -> None:
    ticket().run(small(), Own(), tmp_path)
    with pytest.raises(TostError, match=r"expected a new folder, got .* with rounds in it; pass resume=True"):
        ticket().run(small(), Own(), tmp_path)
    with pytest.raises(TostError, match=r"expected the ticket that .* was started with, got another one"):
        ticket(prune=0.3).run(small(), Own(), tmp_path, resume=True)
