"""TostLightning in real Trainers: what it trains, what its checkpoints are good for, what stands beside it, what it refuses."""

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from tost_plugins import Mask, Session, TostError, TostLightning, masks
from tost_plugins.training.params import prunable

RANK = Path(__file__).resolve().parent.parent / "ranks" / "lightning_ddp.py"
EPOCHS, PER_EPOCH = 3, 4
STEPS = EPOCHS * PER_EPOCH
SOFT_ENDS = 7
TWEAKS = [
    {"kind": "ghost_skip", "until": "0.3dur"},
    {"kind": "soft_activation", "until": "0.55dur"},
    {"kind": "rescaled_init", "iterations": 2},
    {"kind": "label_smoothing", "alpha": 0.2},
]
RECIPES = {
    "snip": {"mask": {"kind": "snip", "sparsity": 0.6}, "tweaks": TWEAKS},
    "rigl": {"mask": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba"}, "tweaks": TWEAKS},
    "dnw": {"mask": {"kind": "dnw", "sparsity": 0.6}, "tweaks": TWEAKS},
}
SNIP = RECIPES["snip"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(LightningModule):
    """Two convolutions with norms, a scheduler, and a loss of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = 0.05
        self.module = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 3, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator))


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(data(), batch_size=32 // PER_EPOCH, shuffle=shuffle)


class Obeys(Callback):
    """Sees that every removed weight is 0 after every step."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        tost = next(other for other in trainer.callbacks if isinstance(other, TostLightning))
        params = prunable(module)
        for name, kept in tost.session.mask.items():
            assert not params[name].detach()[~kept].any()


def fit(
    recipe: Any = SNIP,
    *behind: Callback,
    module: Any = None,
    resume: Path | None = None,
    validate: bool = False,
    **settings: Any,
) -> tuple[Any, TostLightning, Trainer]:
    """A run of three epochs, or as `settings` of the Trainer say."""
    tost, module = TostLightning(recipe), module or Module()
    saves = any(isinstance(other, ModelCheckpoint) for other in behind)
    trainer = Trainer(
        **{"max_epochs": EPOCHS, **QUIET, "enable_checkpointing": saves, **settings}, callbacks=[tost, *behind, Obeys()]
    )
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=resume, weights_only=False)
    return module, tost, trainer


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def assert_ended(module: nn.Module, tost: TostLightning, sparsity: float = 0.6) -> None:
    """Sparse and plain, and nothing of ours is left."""
    assert tost.session.state == "finished" and module.state_dict().keys() == Module().state_dict().keys()
    assert tost.session.mask.sparsity == pytest.approx(sparsity, abs=0.01)
    for name, param in prunable(module).items():
        assert not param.detach()[~tost.session.mask[name]].any() and torch.isfinite(param).all()
    assert not vars(module).keys() & {"training_step", "on_save_checkpoint", "on_load_checkpoint", "optimizer_step"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, TostLightning, Path]]:
    """Of each recipe a whole run, with a checkpoint after each epoch."""
    done: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            every = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
            done[kind] = (*fit(RECIPES[kind], every)[:2], folder)
        return done[kind]

    return get


# ---- the same as a plain loop


@pytest.mark.parametrize(("clip", "how"), [(0.0, "norm"), (0.3, "norm"), (0.01, "value")])
@pytest.mark.parametrize("kind", RECIPES)
def test_it_trains_the_plain_loops_network(kind: str, clip: float, how: Any) -> None:
    """Shuffled, with dropout, and with gradients clipped: bit for bit."""
    module, tost = Module(dropout=0.1), TostLightning(RECIPES[kind])
    torch.manual_seed(5)
    settings = {"gradient_clip_val": clip or None, "gradient_clip_algorithm": how}
    Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **settings, **QUIET).fit(
        module, loader(shuffle=True)
    )
    plain, session = by_hand(RECIPES[kind], clip, how)
    assert tost.session.mask == session.mask and same(module, plain)
    assert_ended(module, tost)


def by_hand(recipe: Any, clip: float, how: str) -> tuple[Module, Session]:
    module = Module(dropout=0.1)
    torch.manual_seed(5)
    batches, session = loader(shuffle=True), Session(module, recipe).attach()
    [optimizer], [schedule] = module.configure_optimizers()
    loss_fn = session.criterion(F.cross_entropy)
    module.train()
    with session.drive(optimizer, batches, F.cross_entropy, total_steps=STEPS):
        for _ in range(EPOCHS):
            for x, y in batches:
                optimizer.zero_grad()
                loss_fn(module(x), y).backward()
                if clip and how == "norm":
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                elif clip:
                    nn.utils.clip_grad_value_(module.parameters(), clip)
                optimizer.step()
                schedule["scheduler"].step()
    return module, session


class Manual(Module):
    """Two optimizers in manual optimization: one for what has a mask, one for the rest."""

    def __init__(self, tost: TostLightning | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss = F.cross_entropy if tost is None else tost.criterion(F.cross_entropy)

    def training_step(self, batch: Any, index: int) -> None:
        loss, optimizers = self.loss(self(batch[0]), batch[1]), self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        large = [param for param in self.parameters() if param.ndim > 1]
        small = [param for param in self.parameters() if param.ndim == 1]
        return [torch.optim.SGD(large, lr=0.05, momentum=0.9), torch.optim.Adam(small)]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    def run(resume: Path | None = None, **settings: Any) -> tuple[Manual, TostLightning]:
        tost = TostLightning(RECIPES["rigl"])
        module = Manual(tost)
        every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        trainer = Trainer(**{"max_epochs": EPOCHS, **settings}, callbacks=[tost, every], **QUIET)
        trainer.fit(module, loader(), ckpt_path=resume)
        return module, tost

    module, tost = run()
    plain = Manual(None)
    session = Session(plain, RECIPES["rigl"]).attach()
    optimizers, loss_fn = plain.configure_optimizers(), session.criterion(F.cross_entropy)
    with session.drive(optimizers, loader(), F.cross_entropy, total_steps=STEPS):
        for _ in range(EPOCHS):
            for x, y in loader():
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss_fn(plain(x), y).backward()
                for optimizer in optimizers:
                    optimizer.step()
    assert same(module, plain) and tost.session.clock.step == STEPS
    assert same(module, run(tmp_path / "epoch=0.ckpt")[0])
    _, short = run(max_epochs=-1, max_steps=12)  # Lightning counts each optimizer's
    assert (short.session.clock.step, short.session.clock.total_steps) == (6, 6)
    with pytest.raises(TostError, match=r"never came by; make the training loss with callback.criterion\(loss_fn\)"):
        fit(module=Manual(None))


def test_batches_without_a_loss_are_left_out() -> None:
    """A `training_step` may return None; the first one, too."""

    class Choosy(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index == 0 else super().training_step(batch, index)

    module, tost, _ = fit(module=Choosy())
    assert_ended(module, tost)
    assert tost.session.clock.step == STEPS and not same(module, fit()[0])


# ---- checkpoints


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_goes_on_bit_for_bit(saved: Any, kind: str, epoch: int) -> None:
    module, tost, folder = saved(kind)
    assert_ended(module, tost)
    again, other, _ = fit(RECIPES[kind], resume=folder / f"epoch={epoch}.ckpt")
    assert same(again, module) and other.session.mask == tost.session.mask and other.session.clock == tost.session.clock
    Trainer(max_epochs=EPOCHS, callbacks=[other], enable_checkpointing=False, **QUIET).fit(
        again, loader(), ckpt_path=folder / f"epoch={epoch}.ckpt"
    )  # the same module once more, which is plain by now
    assert same(again, module) and other.session.mask == tost.session.mask


def test_nothing_is_left_to_train(saved: Any, tmp_path: Path) -> None:
    module, tost, folder = saved("snip")
    again, other, trainer = fit(resume=folder / f"epoch={EPOCHS - 1}.ckpt")
    assert same(again, module) and other.session.mask == tost.session.mask
    assert_ended(again, other)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    longer, more, trainer = fit(resume=tmp_path / "ended.ckpt", max_epochs=EPOCHS + 1)
    assert trainer.global_step == STEPS + PER_EPOCH and more.session.mask == tost.session.mask
    assert_ended(longer, more)


def test_what_a_checkpoint_holds(saved: Any) -> None:
    module, tost, folder = saved("snip")
    first, last = (torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True) for epoch in (0, EPOCHS - 1))
    assert "tost" not in first and any("ghost_skip" in name for name in first["state_dict"])
    assert last["state_dict"].keys() == module.state_dict().keys()
    assert same(Module.load_from_checkpoint(folder / f"epoch={EPOCHS - 1}.ckpt"), module)
    assert Mask.load(folder / f"epoch={EPOCHS - 1}.ckpt") == tost.session.mask
    with pytest.raises(RuntimeError, match="Unexpected key"):  # another network: not silently the plain one
        Module.load_from_checkpoint(folder / "epoch=0.ckpt")


@pytest.mark.parametrize("averaged", [False, True])
def test_the_best_is_a_plain_network(tmp_path: Path, averaged: bool) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, monitor="loss", save_top_k=1, save_last=True)

    class Worse(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", float(self.trainer.global_step))

    behind = [EMAWeightAveraging(decay=0.5)] if averaged else []
    module, _, trainer = fit(SNIP, *behind, best, module=Worse(), validate=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["epoch=1-step=8.ckpt", "last.ckpt"]
    assert best.best_model_score == 8 > SOFT_ENDS
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.validate(module, loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for which in ("best", "last"):
        trainer.validate(module, loader(), ckpt_path=which, verbose=False)
    for name in ("epoch=1-step=8.ckpt", "last.ckpt"):
        Worse.load_from_checkpoint(tmp_path / name)


def test_weights_alone_are_checkpoints_too(tmp_path: Path) -> None:
    module, _, trainer = fit(SNIP, ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="last"))
    assert same(Module.load_from_checkpoint(tmp_path / "last.ckpt"), module)
    trainer.validate(module, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_checkpoints_that_do_not_fit_are_refused(saved: Any, tmp_path: Path) -> None:
    folder = saved("snip")[2]
    trainer = Trainer(max_epochs=1, callbacks=[TostLightning(SNIP)], enable_checkpointing=False, **QUIET)
    with pytest.raises(TostError, match=r"ckpt_path: expected a checkpoint from after the ghosts .* got one of step 4"):
        trainer.validate(Module(), loader(), ckpt_path=folder / "epoch=0.ckpt")
    trainer.validate(Module(), loader(), ckpt_path=folder / "epoch=2.ckpt", verbose=False)
    with pytest.raises(TostError, match="expected a checkpoint of the same mask"):
        fit({**SNIP, "mask": {"kind": "snip", "sparsity": 0.5}}, resume=folder / "epoch=0.ckpt")
    dense = Trainer(max_epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="dense")], **QUIET)
    dense.fit(Module(), loader())
    with pytest.raises(TostError, match="expected a checkpoint of a run with TostLightning, got one without"):
        fit(resume=tmp_path / "dense.ckpt")


# ---- what stands beside it


@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: WeightAveraging(use_buffers=False),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.4),
    ],
    ids=["ema", "weights", "swa"],
)
@pytest.mark.parametrize("kind", RECIPES)
def test_averages_obey_the_mask(kind: str, average: Callable[[], Callback], tmp_path: Path) -> None:
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    module, tost, _ = fit(RECIPES[kind], average(), every, validate=True)
    assert_ended(module, tost)
    assert tost.session.clock.total_steps == STEPS
    again, _, _ = fit(RECIPES[kind], average(), resume=tmp_path / "epoch=0.ckpt", validate=True)
    assert same(again, module)
    trained = fit(RECIPES[kind])[0]
    assert not same(trained, module)  # so that an average it is


def test_an_average_is_the_mean_of_masked_weights() -> None:
    """Of a mask that stands still, by hand."""
    seen: list[dict[str, Tensor]] = []

    class See(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append({name: param.detach().clone() for name, param in module.named_parameters()})

    module, _, _ = fit(SNIP, WeightAveraging(), See())
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.detach(), torch.stack([weights[name] for weights in seen]).mean(0))


class Averaged(Module):
    """Keeps an average of its network: torch's, or a copy that does not train."""

    def __init__(self, kind: str = "", early: bool = False) -> None:
        super().__init__()
        self.kind = kind
        if early:
            self.make()

    def make(self) -> None:
        average = swa_utils.AveragedModel(self.module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        self.average = average if self.kind == "torch" else copy.deepcopy(self.module).requires_grad_(False)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "average"):
            self.make()

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.average, swa_utils.AveragedModel):
            self.average.update_parameters(self.module)
            return
        for mean, param in zip(self.average.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(param.detach(), 0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.module.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", ["torch", "copy"])
def test_a_module_may_average_its_network_from_setup_on(kind: str, tmp_path: Path) -> None:
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    module, tost, _ = fit(SNIP, every, module=Averaged(kind))
    assert tost.session.state == "finished" and len(tost.session.mask) == 3
    found = module.average.state_dict()
    off = 0.5**STEPS  # what is left of the weights that it was made from
    for name, kept in tost.session.mask.items():
        average = found[f"module.{name}" if kind == "torch" else name]
        assert average[~kept].abs().max() <= off and not torch.equal(average, module.module.state_dict()[name])
    again = fit(SNIP, resume=tmp_path / "epoch=1.ckpt", module=Averaged(kind))[0]
    assert same(again.average, module.average) and same(again.module, module.module)


def test_an_average_from_before_attach_is_refused() -> None:
    for recipe in (SNIP, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []}):
        with pytest.raises(TostError, match=r"averages that are made after attach, got average \(AveragedModel\)"):
            fit(recipe, module=Averaged("torch", early=True))


@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_averages_in_front_are_refused(average: Callback) -> None:
    trainer = Trainer(max_epochs=1, callbacks=[average, TostLightning(SNIP)], enable_checkpointing=False, **QUIET)
    with pytest.raises(
        TostError, match=rf"expected to be in front .* write callbacks=\[TostLightning\(...\), {type(average).__name__}"
    ):
        trainer.fit(Module(), loader())


def test_metrics_are_logged_in_the_steps_that_are(tmp_path: Path) -> None:
    fit(logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert all(float(row["tost/sparsity"]) == pytest.approx(0.6, abs=0.01) for row in rows)
    assert [float(row["tost/ghost_skip/alpha"]) > 0 for row in rows] == [True, False, False, False, False, False]


def test_tuners_leave_no_trace(tmp_path: Path) -> None:
    plain = fit()[0]
    tost, module = TostLightning(SNIP), Module()
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": False, "default_root_dir": tmp_path, **QUIET}
    trainer = Trainer(callbacks=[tost], **settings)
    found = Tuner(trainer).lr_find(module, loader(), num_training=10, update_attr=False)
    assert found is not None and len(found.results["loss"]) > 3 and same(module, Module())
    trainer.fit(module, loader())
    assert same(module, plain)
    assert same(
        fit(SNIP, LearningRateFinder(num_training_steps=10, update_attr=False), default_root_dir=tmp_path)[0], plain
    )


def test_batch_sizes_that_are_found_count(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(data(), batch_size=self.batch_size)

        val_dataloader = train_dataloader

    tost, module, batches = TostLightning(SNIP), Module(), Data()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=4)
    trainer = Trainer(
        max_epochs=EPOCHS, callbacks=[finder, tost], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(module, datamodule=batches)
    assert tost.session.clock.step == tost.session.clock.total_steps == EPOCHS * 32 // batches.batch_size
    assert_ended(module, tost)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"accumulate_grad_batches": 2}, 6),
        ({"limit_train_batches": 0.5}, 6),
        ({"overfit_batches": 2}, 6),
        ({"max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"fast_dev_run": 2}, 2),
        ({"precision": "bf16-mixed"}, STEPS),
        ({"precision": "bf16-true"}, STEPS),
        ({"detect_anomaly": True, "barebones": False}, STEPS),
    ],
    ids=str,
)
def test_lengths_and_precisions(settings: dict[str, Any], steps: int) -> None:
    module, tost, trainer = fit(**settings, validate=True)
    assert trainer.global_step == steps == tost.session.clock.step == tost.session.clock.total_steps
    assert tost.session.is_plain
    assert_ended(module, tost)


def test_accumulation_that_changes_with_the_epoch() -> None:
    module, tost, _ = fit(SNIP, GradientAccumulationScheduler({0: 1, 1: 4}))
    assert tost.session.clock.step == tost.session.clock.total_steps == 4 + 1 + 1
    assert_ended(module, tost)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data())


def test_runs_of_unknown_length() -> None:
    tost, stream = TostLightning(SNIP), DataLoader(Stream(), batch_size=8)
    settings = {"enable_checkpointing": False, **QUIET}
    with pytest.raises(
        TostError, match=r"ghost_skip.until: time '0.3dur': expected a run of known length.* pass total_steps="
    ):
        Trainer(max_epochs=EPOCHS, callbacks=[tost], **settings).fit(Module(), stream)
    with pytest.raises(TostError, match="expected a run of known length"):
        fit(max_epochs=-1, max_time={"seconds": 60})
    tost, module = TostLightning(SNIP, total_steps=STEPS), Module()
    Trainer(max_epochs=EPOCHS, callbacks=[tost], **settings).fit(module, stream)
    assert tost.session.clock.step == tost.session.clock.total_steps == STEPS
    assert_ended(module, tost)


def test_several_loaders_and_a_loss_of_ones_own() -> None:
    class Pairs(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.mse_loss(self(batch["a"][0]).mean(1), batch["b"][1].float())

    def forward(module: Any, batch: Any) -> Tensor:
        return module(batch["a"][0])

    def criterion(outputs: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(outputs.mean(1), batch["b"][1].float())

    recipe = {"mask": {"kind": "snip", "sparsity": 0.6}, "tweaks": TWEAKS[:3]}
    tost, module = TostLightning(recipe, forward=forward, criterion=criterion), Pairs()
    trainer = Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **QUIET)
    trainer.fit(module, {"a": loader(), "b": loader()})
    assert_ended(module, tost)
    still = TostLightning({**recipe, "tweaks": []}, forward=forward, criterion=criterion)
    Trainer(max_epochs=1, callbacks=[still], enable_checkpointing=False, **QUIET).fit(
        Pairs(), {"a": loader(), "b": loader()}
    )
    batches = [{"a": batch, "b": batch} for batch in loader()]
    assert still.session.mask == masks.find(Module(), "snip", 0.6, batches, forward=forward, criterion=criterion)
    with pytest.raises(TostError, match="no cross entropy on class indices"):
        fit(
            module=type(
                "Regression", (Module,), {"training_step": lambda self, batch, index: self(batch[0]).square().mean()}
            )()
        )


def test_compiled_modules() -> None:
    plain = fit(RECIPES["rigl"])[0]
    for compiled in (torch.compile(Module(), backend="eager"), Module()):
        if isinstance(compiled, Module):
            compiled.compile(backend="eager")
        tost = TostLightning(RECIPES["rigl"])
        Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **QUIET).fit(compiled, loader())
        torch._dynamo.reset()
        assert same(getattr(compiled, "_orig_mod", compiled), plain)


# ---- more than once, and interrupted


def test_a_second_fit_keeps_the_mask_and_another_module_gets_its_own() -> None:
    module, tost, trainer = fit()
    mask = tost.session.mask
    trainer.fit_loop.max_epochs = EPOCHS + 2
    trainer.fit(module, loader())
    assert trainer.global_step == STEPS + 2 * PER_EPOCH and tost.session.mask == mask
    assert_ended(module, tost)
    other = Module()
    again = Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **QUIET)
    again.fit(other, loader())
    assert tost.session.model is other and tost.session.clock.step == STEPS
    assert_ended(other, tost)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_in_the_same_process(saved: Any, tmp_path: Path, error: type[BaseException]) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                raise error("stop")

    tost, module = TostLightning(RECIPES["dnw"]), Module()
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", save_on_exception=True)
    trainer = Trainer(max_epochs=EPOCHS, callbacks=[tost, Stop(), every], **QUIET)
    with pytest.raises((SystemExit, RuntimeError)):
        trainer.fit(module, loader())
    assert tost.session.state == "running" and "training_step" not in vars(module)
    for name, param in prunable(module).items():
        assert not param.detach()[~tost.session.mask[name]].any()
    again = Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **QUIET)
    again.fit(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(module, saved("dnw")[0])
    assert_ended(module, tost)


# ---- what is refused


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_that_come_late_are_named(hook: str) -> None:
    def late(self: Any, stage: str = "") -> None:
        self.late = nn.Linear(4, 4)

    module = type("Late", (Module,), {hook: late})()
    with pytest.raises(
        TostError, match=r"expected all layers before setup, got late later; make them in the module's __init__"
    ):
        fit({"mask": {"kind": "random", "sparsity": 0.5}}, module=module)


def test_another_pruner_is_refused() -> None:
    with pytest.raises(TostError, match="expected to keep the only mask, got ModelPruning beside it"):
        fit(SNIP, ModelPruning("l1_unstructured", amount=0.5))


def test_a_module_without_forward_asks_for_one() -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = Module().module

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.module(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    with pytest.raises(TostError, match="say how the network is called: forward=lambda model, batch"):
        fit(module=Bare())
    tost = TostLightning(SNIP, forward=lambda module, batch: module.module(batch[0]))
    Trainer(max_epochs=1, callbacks=[tost], enable_checkpointing=False, **QUIET).fit(Bare(), loader())
    assert tost.session.mask.sparsity == pytest.approx(0.6, abs=0.01)


def test_two_in_one_trainer_are_an_error() -> None:
    module, one = Module(), TostLightning(SNIP)
    kinds = [type(each) for each in module.modules()]
    for two in ([one, TostLightning(SNIP)], [one, one]):
        trainer = Trainer(max_epochs=1, callbacks=two, enable_checkpointing=False, **QUIET)
        with pytest.raises(
            TostError, match="TostLightning: expected one in a Trainer, got several; merge their recipes"
        ):
            trainer.fit(module, loader())
    assert [type(each) for each in module.modules()] == kinds


def test_before_a_fit_there_is_no_session() -> None:
    tost = TostLightning(SNIP)
    with pytest.raises(TostError, match=r"TostLightning.session: expected a Trainer's fit"):
        tost.session  # noqa: B018
    assert float(tost.criterion(F.cross_entropy)(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))) == pytest.approx(
        1.386, abs=1e-3
    )


def test_the_older_name_works_too(saved: Any) -> None:
    older = pytest.importorskip("pytorch_lightning")

    class Old(older.LightningModule):
        __init__ = Module.__init__
        forward, training_step = Module.forward, Module.training_step
        configure_optimizers = Module.configure_optimizers

    Old.__init__ = lambda self: (older.LightningModule.__init__(self), setattr(self, "module", Module().module), None)[
        -1
    ]
    Old.lr = 0.05
    tost, module = TostLightning(SNIP), Old()
    older.Trainer(max_epochs=EPOCHS, callbacks=[tost], enable_checkpointing=False, **QUIET).fit(module, loader())
    assert same(module, saved("snip")[0])
    assert_ended(module, tost)


# ---- several ranks


def launch(*command: str) -> str:
    path = os.pathsep.join(map(str, (RANK.parents[2], RANK.parent)))
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_agree(tmp_path: Path) -> None:
    launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RANK), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    first, second = (found["runs"] for found in ranks)

    def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
        return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())

    for case in first:
        assert equal(first[case]["mask"], second[case]["mask"]) and equal(
            first[case]["weights"], second[case]["weights"]
        ), case
        assert first[case]["states"] == second[case]["states"] and len(set(first[case]["states"])) >= 3, case
        assert first[case]["alphas"] == second[case]["alphas"] and first[case]["plain"] and second[case]["plain"], case
    rigl, dnw = ([Mask(mask) for mask in first[kind]["masks"]] for kind in ("rigl", "dnw"))
    assert rigl[0] == rigl[1] != rigl[2] == rigl[3] != rigl[4] and dnw[0] != dnw[-1]
    assert equal(first["whole"]["weights"], first["resumed"]["weights"])
    assert equal(first["whole"]["weights"], first["static"]["weights"])
    assert first["whole"]["states"][4:] == first["resumed"]["states"]
    for found in ranks:  # not a collective more than untouched
        assert found["runs"]["whole"]["sent"] == found["sent"] and sum(found["sent"].values()) >= 3


@pytest.mark.long
def test_processes_that_the_trainer_makes_are_refused() -> None:
    assert (
        "TostError tost_plugins.errors.TostError: TostLightning: expected one device or DDP, got processes by 'spawn'"
        in launch(str(RANK), "spawn")
    )
