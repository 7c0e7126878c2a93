"""TostAlgorithm in real Composer Trainers: the mask holds, ghosts vanish, checkpoints resume, nothing is silent."""

from __future__ import annotations

import copy
import functools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("composer")

from composer import Callback, Trainer
from composer.algorithms import (
    EMA,
    SAM,
    BlurPool,
    GhostBatchNorm,
    GradientClipping,
    SqueezeExcite,
    WeightStandardization,
)
from composer.algorithms import LabelSmoothing as ComposersLabelSmoothing
from composer.core import DataSpec, Event, State
from composer.loggers import InMemoryLogger, Logger
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier, HuggingFaceModel
from composer.optim import CosineAnnealingScheduler, DecoupledAdamW, DecoupledSGDW

from tost_plugins.adapters.composer import TostAlgorithm, apply_tost
from tost_plugins.errors import TostError
from tost_plugins.lab.export import export
from tost_plugins.masks.mask import Mask
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.ghost_skip import ghosts

pytestmark = [
    pytest.mark.filterwarnings("error:Some targets have less than 1"),
    pytest.mark.filterwarnings("ignore:No optimizer was specified"),
    pytest.mark.filterwarnings("ignore:SAM has known issues"),
]

MASK = {"kind": "random", "sparsity": 0.5}
GHOST = {"kind": "ghost_skip", "until": "0.5dur"}
SOFT = {"kind": "soft_activation", "until": "0.75dur", "beta": [1, 10], "schedule": "linear"}
SMOOTH = {"kind": "label_smoothing", "alpha": 0.1}
RECIPE = {"name": "small", "mask": MASK, "tweaks": [GHOST, SOFT, SMOOTH]}
STEPS, PER_EPOCH = 12, 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels, stride in ((3, 1), (8, 2), (8, 1)):
        layers += [nn.Conv2d(channels, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def model(seed: int = 0, **options: Any) -> ComposerClassifier:
    return ComposerClassifier(network(seed), num_classes=4, **options)


def samples(count: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(4, (count,), generator=generator))


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(samples(), batch_size=8, shuffle=shuffle)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def trainer(net: nn.Module, *algorithms: Any, **options: Any) -> Trainer:
    """A Trainer for three epochs of four batches, where the options do not say otherwise."""
    defaults = {"max_duration": "3ep", "train_dataloader": loader(), "progress_bar": False, "device": "cpu", "seed": 7}
    options = {**defaults, **options}
    options.setdefault("optimizers", sgd(net))
    return Trainer(model=net, algorithms=list(algorithms), **options)


def kinds(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules()]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def moments(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by the parameter's name."""
    return {
        f"{name}/{key}": value.clone()
        for name, param in net.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor)
    }


def check_sparse(net: nn.Module, mask: Mask, optimizer: torch.optim.Optimizer | None = None) -> None:
    params = prunable(net)
    assert list(params) == list(mask)
    for name, param in params.items():
        state = {} if optimizer is None else optimizer.state.get(param, {})
        for tensor in (param, *(v for v in state.values() if isinstance(v, Tensor) and v.shape == param.shape)):
            assert not tensor.detach()[~mask[name]].any(), name
    assert any(param.detach().any() for param in params.values())


def check_plain(net: nn.Module, like: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Nothing of ours is left: types, keys, forward, optimizer."""
    assert kinds(net) == kinds(like)
    assert list(net.state_dict()) == list(like.state_dict())
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in net.parameters()}
    assert {id(param) for param in optimizer.state} <= held
    twin = copy.deepcopy(like)
    twin.load_state_dict(net.state_dict())
    batch = samples(8).tensors
    with torch.no_grad():
        assert torch.equal(net.eval()(batch), twin.eval()(batch))


class Watch(Callback):
    """After every batch: the mask holds, and alpha and beta are where the schedule says."""

    def __init__(self, algorithm: TostAlgorithm, ghost_end: float = 6, soft_end: float = 9) -> None:
        self.algorithm, self.ends = algorithm, (ghost_end, soft_end)
        self.steps: list[int] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        session, step = self.algorithm.session, int(state.timestamp.batch)
        self.steps.append(step)
        net = session.model
        check_sparse(net, session.mask, getattr(state.optimizers[0], "base_optimizer", state.optimizers[0]))
        if session.state == "finished":
            return
        ghost_end, soft_end = self.ends
        alphas = [float(ghost.alpha) for ghost in ghosts(net)]
        assert alphas == pytest.approx([max(0.0, 1 - step / ghost_end)] * len(alphas), abs=1e-6)
        relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
        assert [module.tost_strength.live for module in relus] == [step < soft_end] * len(relus)
        if step < soft_end:
            betas = [float(module.tost_beta) for module in relus]
            assert betas == pytest.approx([1 + 9 * step / soft_end] * len(betas))


class Losses(Callback):
    """What the loss of each micro-batch was, beside outputs and labels as the rest of Composer sees them."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Any, Any]] = []

    def before_backward(self, state: State, logger: Logger) -> None:
        self.seen.append((state.loss.detach(), state.outputs, state.batch))


# ---- one line in a script


def test_one_line_trains_with_the_default_recipe_and_leaves_the_plain_network(caplog):
    net, untouched = model(), model()
    before = list(net.parameters())
    with caplog.at_level(logging.INFO, logger="tost_plugins"):
        run = Trainer(
            model=net, algorithms=[TostAlgorithm()], train_dataloader=loader(), max_duration="2ep",
            progress_bar=False, device="cpu",
        )  # fmt: skip
        run.fit()
    said = [record.message for record in caplog.records if record.message.startswith("recipe")]
    assert len(said) == 1
    assert "recipe tost_any_mask: auto, sparsity 0.9000 over 4 layers" in said[0]
    assert "; multiplicative; left out: ghost_skip (8 steps are fewer than its least_steps, 1,250), soft_" in said[0]
    session = run.state.algorithms[0].session
    assert session.state == "finished"
    assert session.mask.kept == round(0.1 * session.mask.size)
    check_sparse(net, session.mask, run.state.optimizers[0])
    check_plain(net, untouched, run.state.optimizers[0])
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))


def hugging_face() -> HuggingFaceModel:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return HuggingFaceModel(transformers.ResNetForImageClassification(config), use_logits=True)


def test_hugging_face_model_with_dict_batches_and_its_loss_inside():
    net, untouched = hugging_face(), hugging_face()
    images, labels = samples().tensors
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    algorithm, losses = TostAlgorithm({**RECIPE, "mask": {"kind": "snip", "sparsity": 0.8}}), Losses()
    watch = Watch(algorithm)
    run = trainer(net, algorithm, train_dataloader=DataLoader(rows, batch_size=8), callbacks=[watch, losses])
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    for loss, outputs, batch in losses.seen:
        expected = F.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)
    assert kinds(net) == kinds(untouched)
    assert list(net.state_dict()) == list(untouched.state_dict())
    check_sparse(net, algorithm.session.mask)


# ---- after every batch


def _param_groups(net: nn.Module) -> torch.optim.Optimizer:
    convs = [p for p in net.parameters() if p.ndim == 4]
    rest = [p for p in net.parameters() if p.ndim != 4]
    return torch.optim.SGD([{"params": convs, "weight_decay": 1e-2}, {"params": rest}], lr=0.05, momentum=0.9)


OPTIMIZERS = {
    "sgd": sgd,
    "groups": _param_groups,
    "decoupled_sgdw": lambda net: DecoupledSGDW(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "decoupled_adamw": lambda net: DecoupledAdamW(net.parameters(), lr=0.01, weight_decay=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_mask_and_schedules_hold_after_every_batch(kind):
    net = model()
    optimizer, algorithm = OPTIMIZERS[kind](net), TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    run = trainer(net, algorithm, optimizers=optimizer, callbacks=[watch])
    convs = next(group for group in optimizer.param_groups if any(p is net.module[3].weight for p in group["params"]))
    added = {id(param) for ghost in ghosts(net) for param in ghost.parameters()}
    assert len(added) == 6
    assert added <= {id(param) for param in convs["params"]}  # ghosts join the group of the convolution beside them
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    check_plain(net, model(), optimizer)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=STEPS),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
        lambda opt: CosineAnnealingScheduler(),
    ],
    ids=["one_cycle", "lambda", "composers_cosine"],
)
def test_schedulers_made_before_the_trainer_drive_the_ghosts_too(scheduler):
    net = model()
    optimizer, algorithm = _param_groups(net), TostAlgorithm(RECIPE)
    schedule = scheduler(optimizer)
    watch = Watch(algorithm)
    run = trainer(
        net, algorithm, optimizers=optimizer, schedulers=schedule, step_schedulers_every_batch=True, callbacks=[watch]
    )
    run.fit()
    assert len(watch.steps) == STEPS
    assert len(optimizer.param_groups) == 2
    check_plain(net, model(), optimizer)


@pytest.mark.parametrize(
    ("until", "duration", "end", "steps"),
    [
        ("0.5dur", "2ep", 4, 8),
        ("0.5dur", "6ba", 3, 6),
        ("1ep", "6ba", 4, 6),
        ("3ba", "2ep", 3, 8),
        ("3ba", "48sp", 3, 6),
        ("1ep", "48sp", 4, 6),
    ],
)
def test_times_in_shares_epochs_and_batches(until, duration, end, steps):
    net = model()
    tweaks = [{"kind": "ghost_skip", "until": until}, {**SOFT, "until": until}]
    algorithm = TostAlgorithm({"mask": MASK, "tweaks": tweaks})
    watch = Watch(algorithm, end, end)
    trainer(net, algorithm, max_duration=duration, callbacks=[watch]).fit()
    assert watch.steps == list(range(1, steps + 1))
    assert algorithm.session.state == "finished"


def test_a_duration_in_samples_cannot_be_shared_out():
    with pytest.raises(
        TostError, match=r"max_duration in epochs or batches, since the recipe says '0.5dur', got '48sp'; write '90ep'"
    ):
        trainer(model(), TostAlgorithm(RECIPE), max_duration="48sp")


def test_train_subset_num_batches_is_the_length_of_an_epoch():
    algorithm = TostAlgorithm(RECIPE)
    watch = Watch(algorithm, 2, 3)
    trainer(model(), algorithm, max_duration="2ep", train_subset_num_batches=2, callbacks=[watch]).fit()
    assert watch.steps == [1, 2, 3, 4]


def test_gradient_accumulation_counts_steps_and_smooths_each_micro_batch():
    net, algorithm, losses = model(), TostAlgorithm(RECIPE), Losses()
    watch = Watch(algorithm)
    run = trainer(net, algorithm, callbacks=[watch, losses], device_train_microbatch_size=2)
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    assert len(losses.seen) == 4 * STEPS
    for loss, outputs, batch in losses.seen:
        torch.testing.assert_close(loss, F.cross_entropy(outputs, batch[1], label_smoothing=0.1))
    check_plain(net, model(), run.state.optimizers[0])


def test_data_driven_parts_see_the_batches_as_the_network_does():
    """Images in bytes, which a DataSpec turns into numbers on their way, are common in Composer."""
    images, labels = samples().tensors
    floats, whole = TensorDataset(images.mul(50).round(), labels), TensorDataset(images.mul(50).round().short(), labels)
    recipe = {
        "mask": {"kind": "snip", "sparsity": 0.5, "batches": 2},
        "tweaks": [{"kind": "rescaled_init", "iterations": 3}],
    }
    spec = DataSpec(
        DataLoader(whole, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        batch_transforms=lambda batch: (batch[0].float(), batch[1]),
        microbatch_transforms=lambda batch: (batch[0] / 50, batch[1]),
    )
    scaled = TensorDataset(floats.tensors[0] / 50, labels)
    plain = DataLoader(scaled, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    ends = []
    for data in (plain, spec):
        net, algorithm = model(), TostAlgorithm(recipe)
        trainer(net, algorithm, train_dataloader=data, max_duration="4ba").fit()
        ends.append(state(net))
    assert same(*ends)


# ---- what is logged


def test_metrics_and_hyperparameters_reach_the_logger():
    class Counting(InMemoryLogger):
        calls = 0

        def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
            Counting.calls += "tost" in hyperparameters
            super().log_hyperparameters(hyperparameters)

    net, memory = model(), Counting()
    run = trainer(net, TostAlgorithm(RECIPE), loggers=[memory])
    run.fit()
    run.fit(duration="1ep")
    values = {
        name: [float(value) for _, value in memory.data[name]] for name in memory.data if name.startswith("tost/")
    }
    assert {len(row) for row in values.values()} == {STEPS + PER_EPOCH}
    assert values["tost/ghost_skip/alpha"][:7] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])
    assert values["tost/soft_activation/beta"][:2] == pytest.approx([2, 3])
    assert set(values["tost/sparsity"]) == {0.5}
    plain = sum(param.numel() for param in net.parameters())
    removed = sum(int((~keep).sum()) for keep in run.state.algorithms[0].session.mask.values())
    assert values["tost/active_parameters"][0] == plain - removed + 2 * (
        64 + 16
    )  # two ghosts, counted while they are there
    assert values["tost/active_parameters"][-1] == plain - removed
    assert Counting.calls == 1
    assert memory.hyperparameters["tost"] == TostAlgorithm(RECIPE).recipe.to_dict()


# ---- label smoothing


def test_only_the_training_loss_sees_smoothed_labels():
    metrics = {"train_metrics": CrossEntropy(), "val_metrics": CrossEntropy()}
    net, losses, memory = model(**metrics), Losses(), InMemoryLogger()
    run = trainer(
        net, TostAlgorithm(RECIPE), callbacks=[losses], loggers=[memory],
        eval_dataloader=loader(), eval_interval="1ep",
    )  # fmt: skip
    run.fit()
    for loss, outputs, (_, labels) in losses.seen:
        assert labels.dtype == torch.int64
        torch.testing.assert_close(loss, F.cross_entropy(outputs, labels, label_smoothing=0.1))
    logged = [float(value) for _, value in memory.data["metrics/train/CrossEntropy"]]
    hard = [float(F.cross_entropy(outputs, batch[1])) for _, outputs, batch in losses.seen]
    assert logged[0] == pytest.approx(hard[0])
    assert float(losses.seen[0][0]) != pytest.approx(hard[0], abs=1e-4)
    images, labels = samples().tensors
    with torch.no_grad():
        found = float(F.cross_entropy(net.eval()((images, labels)), labels))
    assert float(memory.data["metrics/eval/CrossEntropy"][-1][1]) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_a_loss_of_ones_own_is_given_probabilities(loss_fn):
    losses = Losses()
    trainer(model(loss_fn=loss_fn), TostAlgorithm(RECIPE), callbacks=[losses], max_duration="2ba").fit()
    for loss, outputs, (_, labels) in losses.seen:
        torch.testing.assert_close(loss, F.cross_entropy(outputs, labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    "loss_fn",
    [nn.CrossEntropyLoss(label_smoothing=0.1), functools.partial(F.cross_entropy, label_smoothing=0.1)],
    ids=["module", "partial"],
)
def test_a_loss_that_smooths_already_is_an_error(loss_fn):
    net = model(loss_fn=loss_fn)
    before, types = state(net), kinds(net)
    with pytest.raises(TostError, match="label_smoothing: expected a loss with hard labels"):
        trainer(net, TostAlgorithm(RECIPE))
    assert same(state(net), before)
    assert kinds(net) == types


@pytest.mark.parametrize("order", [1, -1])
def test_composers_label_smoothing_as_well_is_an_error(order):
    net = model()
    types = kinds(net)
    with pytest.raises(TostError, match="expected to be the only one, got Composer's LabelSmoothing as well"):
        trainer(net, *[TostAlgorithm(RECIPE), ComposersLabelSmoothing()][::order])
    assert kinds(net) == types
    net = model(loss_fn=F.cross_entropy)
    trainer(net, TostAlgorithm(RECIPE, tweaks=["ghost_skip"]), ComposersLabelSmoothing()).fit()


@pytest.mark.parametrize("twice", ["loss", "algorithm"])
def test_smoothing_that_rests_is_in_nobodys_way(twice):
    rests = {**RECIPE, "tweaks": [{"kind": "label_smoothing", "alpha": 0.1, "least_steps": STEPS + 1}]}
    own = nn.CrossEntropyLoss(label_smoothing=0.1 if twice == "loss" else 0.0)
    others = [] if twice == "loss" else [ComposersLabelSmoothing()]
    net, algorithm = model(loss_fn=own), TostAlgorithm(rests)
    trainer(net, algorithm, *others).fit()
    assert len(algorithm.session.left_out) == 1 and "fewer than its least_steps" in algorithm.session.left_out[0]
    run = trainer(model(loss_fn=own), TostAlgorithm(rests), *map(copy.deepcopy, others), max_duration=f"{STEPS + 1}ba")
    with pytest.raises(TostError, match=r"label_smoothing: expected (to be the only one|a loss with hard labels)"):
        run.fit()


def test_clipping_may_come_first_where_what_acts_on_gradients_rests():
    rests = {**RECIPE, "tweaks": [{"kind": "neuron_gradients", "least_steps": STEPS + 1}]}
    algorithm = TostAlgorithm(rests)
    trainer(model(), GradientClipping("norm", 0.1), algorithm).fit()
    assert len(algorithm.session.left_out) == 1 and algorithm.session.clock.step == STEPS
    run = trainer(model(), GradientClipping("norm", 0.1), TostAlgorithm(rests), max_duration=f"{STEPS + 1}ba")
    with pytest.raises(TostError, match="expected to be in front of GradientClipping where a tweak acts on gradients"):
        run.fit()


# ---- errors, before anything changes


class NoRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_a_recipe_that_finds_nothing_raises_when_the_trainer_is_made():
    net = ComposerClassifier(NoRelu(), num_classes=4)
    before, types = state(net), kinds(net)
    with pytest.raises(TostError, match=r"soft_activation: expected nn\.ReLU"):
        trainer(net, TostAlgorithm({"mask": MASK, "tweaks": ["soft_activation"]}))
    assert same(state(net), before)
    assert kinds(net) == types


def test_two_in_one_trainer_are_an_error():
    net = model()
    types = kinds(net)
    one = TostAlgorithm(RECIPE)
    for two in ((one, TostAlgorithm()), (one, one)):
        with pytest.raises(
            TostError, match="TostAlgorithm: expected one in a Trainer, got several; merge their recipes"
        ):
            trainer(net, *two)
    assert kinds(net) == types


def test_bad_recipes_fail_at_once_and_the_session_says_where_it_comes_from():
    with pytest.raises(TostError, match="did you mean 'synflow'"):
        TostAlgorithm(mask="synflo")
    with pytest.raises(TostError, match="overrides: expected a known override, got 'sparsty'"):
        TostAlgorithm(sparsty=0.5)
    with pytest.raises(TostError, match=r"TostAlgorithm.session: expected a Trainer, got none"):
        TostAlgorithm().session  # noqa: B018


def test_an_optimizer_of_another_model_is_an_error():
    with pytest.raises(TostError, match="optimizer: expected one that trains every prunable weight"):
        trainer(model(), TostAlgorithm(RECIPE), optimizers=sgd(model()))


def test_gradients_that_are_not_finite_stop_the_run_with_the_weights_unchanged():
    net, algorithm = model(), TostAlgorithm(RECIPE)
    data = DataLoader(
        TensorDataset(torch.full((16, 3, 8, 8), torch.inf), torch.zeros(16, dtype=torch.long)), batch_size=8
    )
    run = trainer(net, algorithm, train_dataloader=data)
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(TostError, match="step 0: expected finite gradients, got NaN or Inf in module"):
        run.fit()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


# ---- what a checkpoint holds


def test_repr_can_be_evaluated_and_the_state_is_primitives(tmp_path):
    algorithm = TostAlgorithm(RECIPE, sparsity=0.75, seed=3)
    again = eval(repr(algorithm))
    assert again.recipe == algorithm.recipe
    assert repr(again) == repr(algorithm)
    assert eval(repr(TostAlgorithm())).recipe == TostAlgorithm().recipe
    net = model()
    trainer(net, algorithm)
    kept = algorithm.state_dict()
    assert json.loads(json.dumps(kept)) == kept
    torch.save(kept, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == kept


class Recorded:
    """An uninterrupted run with a checkpoint after every batch, and where it ended."""

    def __init__(self, folder: Path, *others: Any, **options: Any) -> None:
        self.folder = folder
        net, algorithm = model(), TostAlgorithm(RECIPE)
        self.run = trainer(
            net, algorithm, *others, save_folder=str(folder), save_filename="ba{batch}.pt", save_interval="1ba",
            save_num_checkpoints_to_keep=-1, **options,
        )  # fmt: skip
        self.run.fit()
        self.weights, self.mask = state(net), algorithm.session.mask
        self.moments = moments(net, self.run.state.optimizers[0])
        self.finished = str(folder / "finished.pt")
        self.run.save_checkpoint(self.finished)

    def at(self, batch: int) -> str:
        return str(self.folder / f"ba{batch}.pt")

    def check(self, run: Trainer) -> None:
        net, algorithm = run.state.model, next(a for a in run.state.algorithms if isinstance(a, TostAlgorithm))
        assert algorithm.session.state == "finished"
        assert algorithm.session.mask == self.mask
        assert same(state(net), self.weights)
        assert same(moments(net, run.state.optimizers[0]), self.moments)
        check_plain(net, model(), run.state.optimizers[0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("batch", [2, 4, 7, 10])  # ghosts live, an epoch's end, ghosts dormant, relu again
@pytest.mark.parametrize("late", [False, True], ids=["loader_at_once", "loader_in_fit"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(recorded, batch, late):
    net, algorithm = model(seed=1), TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    options = {"train_dataloader": None, "max_duration": None} if late else {}
    run = trainer(net, algorithm, load_path=recorded.at(batch), callbacks=[watch], **options)
    assert algorithm.session.clock.step == batch
    run.fit(**({"train_dataloader": loader(), "duration": f"{STEPS - batch}ba"} if late else {}))
    assert watch.steps == list(range(batch + 1, STEPS + 1))
    recorded.check(run)


def test_a_longer_duration_does_not_stretch_the_schedules(recorded):
    algorithm = TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    trainer(model(seed=1), algorithm, load_path=recorded.at(2), max_duration="5ep", callbacks=[watch]).fit()
    assert watch.steps == list(range(3, 5 * PER_EPOCH + 1))


def test_a_checkpoint_from_the_very_end_is_finished_when_it_is_loaded(recorded):
    run = trainer(model(seed=1), TostAlgorithm(RECIPE), load_path=recorded.at(STEPS))
    recorded.check(run)
    run.fit()  # the last batch is done, only the epoch is not counted yet
    recorded.check(run)
    run.fit(duration="1ep")
    check_sparse(run.state.model, recorded.mask, run.state.optimizers[0])


def test_a_finished_run_is_loaded_and_goes_on_with_its_mask(recorded):
    net, algorithm = model(seed=1), TostAlgorithm(RECIPE)
    run = trainer(net, algorithm, load_path=recorded.finished)
    recorded.check(run)
    run.fit(duration="1ep")
    check_sparse(net, recorded.mask, run.state.optimizers[0])


@pytest.mark.parametrize("batch", [2, 7, 10])
def test_evaluation_of_a_loaded_run_needs_neither_data_nor_duration(recorded, batch):
    """Alpha and beta are those of that moment: what is evaluated is what was trained."""
    seen: dict[str, Any] = {}

    class Look(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if int(state.timestamp.batch) == batch:
                with torch.no_grad():
                    seen["logits"] = state.model.eval()(samples().tensors)
                state.model.train()

    trainer(model(), TostAlgorithm(RECIPE), callbacks=[Look()]).fit()
    net = model(seed=1)
    options = {"train_dataloader": None, "max_duration": None}
    for weights_only in (False, True):
        net = model(seed=1)
        trainer(net, TostAlgorithm(RECIPE), load_path=recorded.at(batch), load_weights_only=weights_only, **options)
        with torch.no_grad():
            assert torch.equal(net.eval()(samples().tensors), seen["logits"])


@pytest.mark.filterwarnings("ignore:Automatically adding required_on_load")
@pytest.mark.parametrize("moment", [3, 8, "finished"])
def test_a_trainer_without_the_algorithm_gets_it_with_the_checkpoint(recorded, moment):
    path = recorded.finished if moment == "finished" else recorded.at(moment)
    run = trainer(model(seed=1), load_path=path)
    assert [type(algorithm) for algorithm in run.state.algorithms] == [TostAlgorithm]
    if moment != "finished":
        run.fit()
    recorded.check(run)


@pytest.mark.filterwarnings("ignore:Automatically adding required_on_load")
@pytest.mark.parametrize("train", [False, True])
def test_weights_of_a_finished_run_need_no_ghosts(recorded, train):
    net = model(seed=1)
    options = {} if train else {"train_dataloader": None, "max_duration": None}
    run = trainer(net, load_path=recorded.finished, load_weights_only=True, **options)
    assert same(state(net), recorded.weights)
    check_plain(net, model(), run.state.optimizers[0])
    if train:
        run.fit()
        check_sparse(net, recorded.mask)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batch", [2, 7])
def test_weights_alone_begin_a_new_run_with_the_same_mask(recorded, batch, strict):
    net, algorithm = model(seed=1), TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    run = trainer(
        net, algorithm, load_path=recorded.at(batch), load_weights_only=True, load_strict_model_weights=strict,
        callbacks=[watch],
    )  # fmt: skip
    assert algorithm.session.clock.step == 0
    assert algorithm.session.metrics()["tost/ghost_skip/alpha"] == 1
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    assert algorithm.session.mask == recorded.mask
    check_plain(net, model(), run.state.optimizers[0])


@pytest.mark.parametrize("strict", [False, True])
def test_weights_of_the_dense_network_load_into_an_attached_one(tmp_path, strict):
    dense = model(seed=2)
    trainer(dense, max_duration="1ba").save_checkpoint(str(tmp_path / "dense.pt"))
    net, algorithm = model(), TostAlgorithm(RECIPE)
    run = trainer(
        net, algorithm, load_path=str(tmp_path / "dense.pt"), load_weights_only=True, load_strict_model_weights=strict
    )
    for name, value in prunable(dense).items():
        assert torch.equal(prunable(net)[name].detach(), value.detach() * algorithm.session.mask[name])
    run.fit()
    check_sparse(net, algorithm.session.mask)


# ---- the best checkpoint


class Best:
    """When to save, as docs/adapters.md shows it: at each new best on the network without ghosts. `score` gets worse
    with every batch, so that the best of all is the first."""

    def __init__(self, algorithm: TostAlgorithm, any_moment: bool = False) -> None:
        self.algorithm, self.any_moment, self.best = algorithm, any_moment, float("-inf")

    def __call__(self, state: State, event: Event) -> bool:
        if event != Event.BATCH_CHECKPOINT or not (self.any_moment or self.algorithm.session.is_plain):
            return False
        before, self.best = self.best, max(self.best, -float(state.timestamp.batch))
        return self.best > before


def test_the_best_checkpoint_is_one_of_the_plain_network(tmp_path):
    algorithm = TostAlgorithm(RECIPE)
    options = {"save_folder": str(tmp_path), "save_filename": "best.pt", "save_overwrite": True}
    trainer(model(), algorithm, save_interval=Best(algorithm), **options).fit()
    export(tmp_path / "best.pt", tmp_path / "best.safetensors")
    plain = model(seed=1)
    plain.module.load_state_dict(load_file(tmp_path / "best.safetensors"), strict=True)
    check_sparse(plain, algorithm.session.mask)
    loaded, again = model(seed=2), TostAlgorithm(RECIPE)
    trainer(
        loaded, again, load_path=str(tmp_path / "best.pt"), load_weights_only=True, train_dataloader=None,
        max_duration=None,
    )  # fmt: skip
    assert again.session.is_plain and again.session.clock.step == 9
    again.session.finish()
    assert same(state(loaded), state(plain))


@pytest.mark.filterwarnings("ignore:Automatically adding required_on_load")
def test_a_best_checkpoint_with_ghosts_does_not_pass_for_the_plain_network(tmp_path, caplog):
    algorithm = TostAlgorithm(RECIPE)
    options = {"save_folder": str(tmp_path), "save_filename": "best.pt", "save_overwrite": True}
    trainer(model(), algorithm, save_interval=Best(algorithm, any_moment=True), **options).fit()
    with pytest.raises(TostError, match="expected a checkpoint from after the ghosts have ended"):
        export(tmp_path / "best.pt", tmp_path / "best.safetensors")
    net = model(seed=1)  # without the algorithm: Composer adds it, and with it the ghosts at their strength
    run = trainer(
        net, load_path=str(tmp_path / "best.pt"), load_weights_only=True, train_dataloader=None, max_duration=None
    )
    (added,) = run.state.algorithms
    assert not added.session.is_plain and added.session.metrics()["tost/ghost_skip/alpha"] > 0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model().load_state_dict(state(net))
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        added.session.finish()
    assert "the network changes abruptly" in caplog.text


@pytest.mark.filterwarnings("ignore:required_on_load algorithm")
def test_a_checkpoint_of_another_recipe_is_an_error(recorded):
    with pytest.raises(TostError, match="load_state_dict: expected a checkpoint of the same mask"):
        trainer(model(), TostAlgorithm(RECIPE, sparsity=0.6), load_path=recorded.at(3))


# ---- more than one fit, more than one model


@pytest.mark.parametrize("late", [False, True])
def test_a_second_fit_keeps_the_mask(late):
    net, algorithm = model(), TostAlgorithm(RECIPE)
    data = {"train_dataloader": None, "max_duration": None} if late else {}
    watch = Watch(algorithm)
    run = trainer(net, algorithm, callbacks=[watch], **data)
    run.fit(**({"train_dataloader": loader(), "duration": "3ep"} if late else {}))
    mask, first = algorithm.session.mask, state(net)
    run.fit(duration="2ep")
    assert len(watch.steps) == STEPS + 2 * PER_EPOCH
    assert algorithm.session.mask == mask
    assert not same(first, state(net))
    check_plain(net, model(), run.state.optimizers[0])


def test_the_duration_given_to_fit_counts():
    net, algorithm = model(), TostAlgorithm(RECIPE)
    watch = Watch(algorithm, 4, 6)
    run = trainer(net, algorithm, max_duration="5ep", callbacks=[watch])
    run.fit(duration="2ep")
    assert algorithm.session.state == "finished"
    run.fit(duration="1ep")
    assert len(watch.steps) == 3 * PER_EPOCH


class Interrupt(Callback):
    def __init__(self, batch: int, error: type[BaseException] | None = KeyboardInterrupt) -> None:
        self.batch, self.error = batch, error

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch and self.error is not None:
            raise self.error
        if int(state.timestamp.batch) == self.batch:
            state.stop_training()


def test_fit_after_an_interruption_goes_on_with_the_schedule():
    net, algorithm = model(), TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    run = trainer(net, algorithm, callbacks=[watch, Interrupt(4)])
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert algorithm.session.state == "running"
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    check_plain(net, model(), run.state.optimizers[0])


def test_another_trainer_takes_over_a_model_that_was_interrupted():
    net, algorithm = model(), TostAlgorithm(RECIPE)
    run = trainer(net, algorithm, callbacks=[Interrupt(4)])
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    mask = algorithm.session.mask
    watch = Watch(algorithm)
    run = trainer(net, algorithm, callbacks=[watch])
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    assert algorithm.session.mask == mask
    check_plain(net, model(), run.state.optimizers[0])


def test_stopping_early_finishes_and_says_so(caplog):
    net, algorithm = model(), TostAlgorithm(RECIPE)
    run = trainer(net, algorithm, callbacks=[Interrupt(3, None)])
    with caplog.at_level(logging.WARNING, logger="tost_plugins"):
        run.fit()
    assert "finish at step 3, before the schedules ended" in caplog.text
    check_plain(net, model(), run.state.optimizers[0])


def test_one_instance_serves_two_models():
    algorithm = TostAlgorithm(RECIPE)
    ends = []
    for _ in range(2):
        net = model()
        run = trainer(net, algorithm, max_duration="4ba")
        run.fit()
        check_plain(net, model(), run.state.optimizers[0])
        ends.append(state(net))
    assert same(*ends)


def test_a_mask_of_ones_own_is_used_as_it_is():
    net = model()
    mask = Mask({name: torch.rand(param.shape) < 0.3 for name, param in prunable(net).items()})
    algorithm = TostAlgorithm(RECIPE, mask=mask)
    trainer(net, algorithm, max_duration="2ba").fit()
    assert algorithm.session.mask == mask
    check_sparse(net, mask)


# ---- beside Composer's own algorithms


@pytest.mark.parametrize("first", [False, True], ids=["behind", "in_front"])
@pytest.mark.parametrize(
    "other", [EMA(half_life="2ba"), SAM(interval=2), GradientClipping("norm", 0.1)], ids=lambda a: type(a).__name__
)
def test_other_algorithms_beside_it(other, first, tmp_path):
    net, algorithm = model(), TostAlgorithm(RECIPE)
    watch = Watch(algorithm)
    both = [algorithm, copy.deepcopy(other)]
    run = trainer(
        net, *(both if first else both[::-1]), callbacks=[watch], eval_dataloader=loader(), eval_interval="1ep"
    )
    run.fit()
    assert len(watch.steps) == STEPS
    optimizer = run.state.optimizers[0]
    check_plain(net, model(), getattr(optimizer, "base_optimizer", optimizer))
    check_plain(net, model(), optimizer)
    run.save_checkpoint(str(tmp_path / "finished.pt"))
    check_sparse(net, algorithm.session.mask)
    for other in run.state.algorithms:
        if isinstance(other, EMA):
            averaged = other.get_ema_model(copy.deepcopy(net))
            assert not same(state(averaged), state(net))
            check_sparse(averaged, algorithm.session.mask)


@pytest.mark.parametrize("first", [False, True], ids=["behind", "in_front"])
def test_clipping_clips_the_masked_gradient(first):
    norms = []

    class Norm(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            grads = [param.grad for param in state.model.parameters() if param.grad is not None]
            norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    both = [TostAlgorithm(RECIPE), GradientClipping("norm", 1e-3)]
    trainer(model(), *(both if first else both[::-1]), callbacks=[Norm()]).fit()
    assert norms == pytest.approx([1e-3] * STEPS, rel=1e-2)


def test_averaged_weights_in_checkpoints_do_not_upset_the_schedule(tmp_path, caplog):
    """EMA swaps its averages into the model before a checkpoint, also of our masks and clock, and out before a batch."""
    ends = []
    for batch in (0, 4):
        net, algorithm, ema = model(), TostAlgorithm(RECIPE), EMA(half_life="20ba")
        watch = Watch(algorithm)
        run = trainer(
            net, algorithm, ema, callbacks=[watch], load_path=str(tmp_path / "ba4.pt") if batch else None,
            save_folder=str(tmp_path), save_filename="ba{batch}.pt", save_interval="4ba", save_overwrite=True,
        )  # fmt: skip
        run.fit()
        assert watch.steps == list(range(batch + 1, STEPS + 1))
        assert ema.ema_weights_active
        check_plain(net, model(), run.state.optimizers[0])
        check_sparse(net, algorithm.session.mask)
        ema.get_training_model(net)
        check_sparse(net, algorithm.session.mask)
        ends.append(state(net))
    assert same(*ends)
    assert "before the schedules ended" not in caplog.text


@pytest.mark.parametrize("first", [True, False], ids=["in_front", "behind"])
def test_what_an_average_is_evaluated_as_is_as_plain_as_the_run(first):
    """EMA's average of alpha and beta says how strong they were; the run says how strong they are."""
    seen = []

    class Look(Callback):
        def eval_batch_end(self, state: State, logger: Logger) -> None:
            weights = {name: value.clone() for name, value in state.model.state_dict().items()}
            seen.append((int(state.timestamp.batch), weights, state.batch, state.outputs.clone()))

    net, algorithm, ema = model(), TostAlgorithm(RECIPE), EMA(half_life="4ba", update_interval="1ba")
    both = [algorithm, ema]
    run = trainer(
        net, *(both if first else both[::-1]), callbacks=[Look()], eval_dataloader=loader(), eval_interval="2ba"
    )
    run.fit()
    for step, weights, batch, outputs in seen:
        plain = model().eval()
        names = plain.state_dict().keys()
        plain.load_state_dict({name: value for name, value in weights.items() if name in names})
        with torch.no_grad():
            assert torch.equal(plain(batch), outputs) == (step >= 9), step  # ghosts end at 6, soft activations at 9
        averaged = [float(value) for name, value in weights.items() if name.endswith("alpha")]
        assert step < 9 or all(value > 0.01 for value in averaged)  # of the average, while it is evaluated
    assert {step for step, *_ in seen} == {2, 4, 6, 8, 10, 12}


# ---- masks that move

RIGL = {"kind": "rigl", "sparsity": 0.5, "every": "2ba", "until": "10ba", "drop": 0.5}
DNW = {"kind": "dnw", "sparsity": 0.5}
MOVING = pytest.mark.parametrize("mask", [RIGL, DNW], ids=lambda mask: mask["kind"])


@MOVING
@pytest.mark.parametrize("first", [False, True], ids=["behind", "in_front"])
def test_sam_takes_two_gradients_where_a_moving_mask_expects_one(mask, first):
    both = [TostAlgorithm({"mask": mask}), SAM()]
    net = model()
    before = state(net)
    message = (
        f"TostAlgorithm: mask {mask['kind']}: expected one gradient for each step, got SAM, which takes two; leave SAM "
        f"out, or use a mask that does not move"
    )
    with pytest.raises(TostError, match=message):
        trainer(net, *(both if first else both[::-1]))
    assert same(state(net), before)


@MOVING
def test_steps_that_composer_makes_while_it_loads_and_saves_move_no_mask(mask, tmp_path):
    """A fresh optimizer gets its state by a step with gradients of 0, which must not count as one of ours."""
    recipe, masks = {"mask": mask}, []

    class Look(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            masks.append(algorithm.session.mask)

    algorithm, whole = TostAlgorithm(recipe), model()
    trainer(whole, algorithm, callbacks=[Look()], save_folder=str(tmp_path), save_filename="ba{batch}.pt", save_interval="1ba",
            save_num_checkpoints_to_keep=-1).fit()  # fmt: skip
    for batch in (1, 2, 3, 4):  # at 2 and 4, RigL is due
        net, algorithm, steps = model(seed=1), TostAlgorithm(recipe), []
        optimizer = sgd(net)
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        run = trainer(net, algorithm, optimizers=optimizer, load_path=str(tmp_path / f"ba{batch}.pt"))
        assert steps == [1] and algorithm.session.clock.step == batch and algorithm.session.mask == masks[batch - 1]
        run.save_checkpoint(str(tmp_path / "again.pt"))
        assert algorithm.session.clock.step == batch and algorithm.session.mask == masks[batch - 1]
        run.fit()
        assert same(state(net), state(whole)) and algorithm.session.mask == masks[-1]


def test_micro_batches_move_a_mask_with_the_step(tmp_path):
    masks = []

    class Look(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            masks.append(algorithm.session.mask)

    algorithm = TostAlgorithm({"mask": RIGL})
    trainer(model(), algorithm, callbacks=[Look()], device_train_microbatch_size=2).fit()
    assert [i for i in range(2, STEPS + 1) if masks[i - 1] != masks[i - 2]] == [3, 5, 7, 9]


@MOVING
@pytest.mark.parametrize("evaluated", [False, True])
def test_averaged_weights_take_the_mask_of_the_end(mask, evaluated, tmp_path):
    """EMA averages masks as well, in its own copy: the run goes on with those of the training, and ends with their last."""
    ends, masks = [], []
    for batch in (0, 4):
        net, algorithm, ema = model(), TostAlgorithm({"mask": mask}), EMA(half_life="3ba")
        run = trainer(
            net, algorithm, ema, load_path=str(tmp_path / "ba4.pt") if batch else None, save_folder=str(tmp_path),
            save_filename="ba{batch}.pt", save_interval="4ba", save_overwrite=True,
            eval_dataloader=loader() if evaluated else None,
        )  # fmt: skip
        run.fit()
        masks.append(algorithm.session.mask)
        assert ema.ema_weights_active != evaluated and masks[-1].sparsity == pytest.approx(0.5, abs=1e-3)
        check_plain(net, model(), run.state.optimizers[0])
        check_sparse(net, masks[-1])
        if ema.ema_weights_active:
            ema.get_training_model(net)
        check_sparse(net, masks[-1])
        ends.append(state(net))
    net, algorithm = model(), TostAlgorithm({"mask": mask})
    trainer(net, algorithm).fit()
    assert masks == [algorithm.session.mask] * 2 and same(*ends) and same(ends[0], state(net))


# ---- the function


def test_apply_tost_twice_is_once_and_a_trainer_goes_on_with_it():
    net = model()
    optimizer = _param_groups(net)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)
    session = apply_tost(net, RECIPE, optimizer)
    assert apply_tost(net, RECIPE, optimizers=(optimizer,)) is session
    assert apply_tost(net) is session
    added = [id(param) for ghost in ghosts(net) for param in ghost.parameters()]
    assert [id(param) for param in optimizer.param_groups[0]["params"][3:]] == added
    assert len(optimizer.param_groups) == 2
    algorithm = TostAlgorithm()
    watch = Watch(algorithm)
    run = trainer(
        net, algorithm, optimizers=optimizer, schedulers=schedule, step_schedulers_every_batch=True, callbacks=[watch]
    )
    assert algorithm.session is session
    assert algorithm.recipe == session.recipe
    run.fit()
    assert watch.steps == list(range(1, STEPS + 1))
    check_plain(net, model(), optimizer)


def test_apply_tost_before_the_optimizer_and_with_another_recipe():
    net = model()
    optimizer = sgd(net)
    session = apply_tost(net, RECIPE, mask="magnitude", sparsity=0.5)
    assert session.recipe.mask.kind == "magnitude"
    assert apply_tost(net, optimizers=optimizer) is session
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
    mask = Mask({name: torch.rand(param.shape) < 0.3 for name, param in prunable(net).items()})
    for other in (TostAlgorithm(RECIPE), TostAlgorithm(session.recipe, mask=mask)):
        with pytest.raises(TostError, match="apply_tost: expected the recipe and mask that the model is attached with"):
            trainer(net, other)


# ---- several ranks


def test_two_ranks_agree_and_ghosts_end_without_unused_parameters(tmp_path):
    script = Path(__file__).parents[1] / "ranks" / "composer_ddp.py"
    launch = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script), str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["find_unused_parameters"] is False
    assert len(set(one["states"])) == 6
    assert one["sent"] == one["untouched"] and sum(one["sent"].values()) >= 3
    assert one["alphas"] == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0])
    assert one["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert one["plain"]
    assert one["resumed"] == one["weights"]
    assert len(one["refused"]) == 2
    for text in one["refused"]:
        assert text.startswith("TostAlgorithm: expected one process or DDP, got a parallelism_config")
    for moving in one["moving"]:
        masks = moving["whole"].pop("masks")
        assert (
            masks[1] != masks[2]
            and masks[3] != masks[4]
            and moving["whole"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
        )
        assert moving["resumed"].pop("states") == moving["whole"].pop("states")[4:]
        assert moving["resumed"].pop("masks") == masks[4:] and moving["resumed"] == moving["whole"]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(BlurPool, min_channels=8),
        functools.partial(GhostBatchNorm, 4),
        functools.partial(SqueezeExcite, min_channels=8, latent_channels=4),
        WeightStandardization,
    ],
    ids=["BlurPool", "GhostBatchNorm", "SqueezeExcite", "WeightStandardization"],
)
def test_what_replaces_layers_goes_in_front(make: Any) -> None:
    name = type(make()).__name__
    with pytest.raises(TostError, match=rf"got it in front of {name}; put it behind: write \[{name}\(\.\.\.\), Tost"):
        trainer(model(), TostAlgorithm(RECIPE), make())
    right = TostAlgorithm(RECIPE)
    trainer(model(), make(), right).fit()
    assert right.session.state == "finished"
    assert right.session.mask.sparsity == pytest.approx(0.5, abs=0.02)
