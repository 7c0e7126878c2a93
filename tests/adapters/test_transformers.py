"""TostCallback in real Trainers: what it trains, that it leaves no trace, that it resumes exactly, and what it refuses."""

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tost_plugins import Mask, Recipe, Session, TostCallback, TostError
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.surgery.swap import mixins_of

RANK = Path(__file__).resolve().parent.parent / "ranks" / "transformers_ddp.py"
STEPS = 10  # of one whole run: 2.5 epochs of 4 batches
GHOSTS_END, SOFT_ENDS = 3, 6
RECIPE = {
    "name": "test",
    "mask": {"kind": "snip", "sparsity": 0.6},
    "tweaks": [
        {"kind": "ghost_skip", "until": "0.3dur"},
        {"kind": "soft_activation", "until": "0.6dur"},
        {"kind": "rescaled_init", "iterations": 2},
        {"kind": "label_smoothing", "alpha": 0.2},
    ],
}
MASK_ONLY = {**RECIPE, "tweaks": []}


class Net(nn.Module):
    """Three convolutions with norms, a functional relu, dropout; returns its loss like a model of the Hub."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm0, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(8, 4)

    def logits(self, x: Tensor) -> Tensor:
        x = self.act(self.norm0(self.stem(x)))
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)) + x)
        return self.head(self.dropout(x.mean((2, 3))))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits(pixel_values)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


class Tuples(Net):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits(pixel_values)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class Ignores(Net):
    """Is given num_items_in_batch and takes the mean all the same, like the Hub's ResNet."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(pixel_values, labels)


class Divides(Net):
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        logits = self.logits(pixel_values)
        loss = F.cross_entropy(logits, labels, reduction="sum") / (num_items_in_batch or len(labels))
        return {"logits": logits, "loss": loss}


class Bare(Net):
    """Returns logits only."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.logits(pixel_values)


class Each(TrainerCallback):
    """Calls a function with the Trainer's state after every optimizer step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(state, kwargs)


def samples(count: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]


def make(
    folder: Path,
    callbacks: list[Any],
    model: nn.Module | None = None,
    trainer: dict[str, Any] | None = None,
    **args: Any,
) -> Trainer:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "learning_rate": 0.05, "optim": "sgd",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": STEPS,
        "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    data = samples()
    return Trainer(
        model=Net() if model is None and "model_init" not in (trainer or {}) else model,
        args=TrainingArguments(**{**settings, **args}),
        train_dataset=data, eval_dataset=data[:8], callbacks=callbacks, **(trainer or {}),
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    return [name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name])]


def outside(model: nn.Module, mask: Mask) -> float:
    """The largest weight outside the mask."""
    return max(float((param.detach().abs() * ~mask[name]).max()) for name, param in prunable(model).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor], Mask]]:
    """A whole run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    callback = TostCallback(RECIPE)
    trainer = make(folder, [callback], save_strategy="steps", save_steps=1)
    trainer.train()
    yield folder, weights(trainer.model), callback.session.mask


# ---- what it trains


def test_one_line_trains_a_model_of_the_hub_and_leaves_no_trace(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4)
    model = ResNetForImageClassification(config)
    plain, parameters = copy.deepcopy(model), dict(model.named_parameters())

    default = TrainingArguments.default_optim
    tweaks = [tweak | {"least_steps": 0} for tweak in Recipe.of(None).to_dict()["tweaks"]]  # else they rest in 6 steps
    trainer = make(tmp_path, [TostCallback(tweaks=tweaks)], model, max_steps=6, learning_rate=0.01, optim=default)
    trainer.train()

    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TostCallback))
    session = callback.session
    assert session.state == "finished" and not session.left_out
    assert abs(session.mask.sparsity - 0.9) < 0.001 and outside(model, session.mask) == 0
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(param is parameters[name] for name, param in model.named_parameters())
    assert differences(weights(model), weights(plain))

    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [type(plain).__name__]
    loaded, info = ResNetForImageClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    assert not differences(weights(loaded), weights(model))
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(image).logits, model.eval()(image).logits)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_leaves_anything_outside_the_mask(tmp_path: Path, optim: str, accumulation: int) -> None:
    seen, callback = [], TostCallback(RECIPE)

    def look(state: Any, kwargs: dict[str, Any]) -> None:
        model, mask = kwargs["model"], callback.session.mask
        assert outside(model, mask) == 0
        params = prunable(model)
        for name, param in params.items():
            for value in kwargs["optimizer"].state[param].values():
                assert value.shape != param.shape or not value[~mask[name]].any()
        trained = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters()}
        metrics = callback.session.metrics()
        seen.append((state.global_step, callback.session.clock.step, metrics["tost/ghost_skip/alpha"],
                     metrics["tost/soft_activation/active"]))  # fmt: skip

    trainer = make(
        tmp_path, [callback, Each(look)], optim=optim, gradient_accumulation_steps=accumulation, num_train_epochs=2,
        max_steps=-1, warmup_steps=1, **({"optim_args": "momentum=0.9"} if optim == "sgd" else {}),
    )  # fmt: skip
    trainer.train()
    total = 8 // accumulation
    assert [step for step, *_ in seen] == [step for _, step, *_ in seen] == list(range(1, total + 1))
    assert callback.session.clock.total_steps == total
    assert callback.session.clock.steps_per_epoch == total // 2
    assert [alpha > 0 for _, _, alpha, _ in seen] == [step < round(0.3 * total) for step in range(1, total + 1)]
    assert [live > 0 for *_, live in seen] == [step < round(0.6 * total) for step in range(1, total + 1)]
    assert callback.session.state == "finished"


def test_an_optimizer_made_before_gets_the_ghosts(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = len(optimizer.param_groups[0]["params"])
    trainer = make(tmp_path, [TostCallback(RECIPE)], model, {"optimizers": (optimizer, scheduler)})
    assert len(optimizer.param_groups[0]["params"]) > before
    trainer.train()
    assert len(optimizer.param_groups[0]["params"]) == before


def test_metrics_reach_the_history_and_reporters_in_front_of_us(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    reported: list[dict[str, float]] = []
    trainer = make(tmp_path, [Reporter(), TostCallback(RECIPE)], eval_strategy="steps", eval_steps=5)
    trainer.train()
    losses = [row for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS and [row for row in reported if "loss" in row] == [
        {k: v for k, v in row.items() if k != "step"} for row in losses
    ]
    assert [row["tost/ghost_skip/alpha"] > 0 for row in losses] == [step < GHOSTS_END for step in range(1, STEPS + 1)]
    assert losses[0]["tost/soft_activation/beta"] < losses[4]["tost/soft_activation/beta"] <= 100
    assert all(abs(row["tost/sparsity"] - 0.6) < 0.002 for row in trainer.state.log_history)
    assert losses[0]["tost/active_parameters"] > trainer.evaluate()["tost/active_parameters"]


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    def run(**args: Any) -> dict[str, Tensor]:
        model = Net()
        model.dropout.p = 0.0  # evaluating draws a number, with or without us
        trainer = make(tmp_path, [TostCallback(RECIPE)], model, **args)
        trainer.train()
        return weights(model)

    assert not differences(run(), run(eval_strategy="steps", eval_steps=1, eval_on_start=True))


def test_a_second_train_keeps_the_mask(tmp_path: Path) -> None:
    callback = TostCallback(RECIPE)
    trainer = make(tmp_path, [callback], max_steps=3)
    trainer.train()
    first, mask = weights(trainer.model), callback.session.mask
    steps = []
    trainer.add_callback(Each(lambda state, kwargs: steps.append(outside(kwargs["model"], mask))))
    trainer.train()
    assert differences(weights(trainer.model), first) and steps == [0.0] * 3
    assert callback.session.mask is mask and list(trainer.model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize("automatic", [False, True])
def test_a_run_that_begins_again_begins_its_schedules_again(tmp_path: Path, automatic: bool) -> None:
    callback, seen = TostCallback(RECIPE), []

    def look(state: Any, kwargs: dict[str, Any]) -> None:
        seen.append((state.global_step, callback.session.metrics()["tost/ghost_skip/alpha"] > 0))
        if len(seen) == 2:
            raise RuntimeError("CUDA out of memory." if automatic else "stopped")

    again = {"auto_find_batch_size": True, "num_train_epochs": 2, "max_steps": -1} if automatic else {}
    trainer = make(tmp_path, [callback, Each(look)], **again)
    if not automatic:
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.train()
    first = callback.session.mask if not automatic else None
    trainer.train()
    total = trainer.state.max_steps
    assert seen[2:] == [(step, step < round(0.3 * total)) for step in range(1, total + 1)]
    assert callback.session.clock.total_steps == total and (first is None or callback.session.mask == first)
    assert callback.session.state == "finished" and outside(trainer.model, callback.session.mask) == 0


@pytest.mark.parametrize("setting", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_under_wrappers_the_finished_model_works(tmp_path: Path, setting: dict[str, Any]) -> None:
    callback = TostCallback(RECIPE)
    trainer = make(tmp_path, [callback], max_steps=4, **setting)
    trainer.train()
    assert callback.session.smoothing.seen and outside(trainer.model, callback.session.mask) == 0
    assert list(trainer.model.state_dict()) == list(Net().state_dict()) and type(trainer.model) is Net
    found = trainer.predict(samples()[:8]).predictions
    plain = Net(1)
    plain.load_state_dict(trainer.model.state_dict())
    inputs = torch.stack([sample["pixel_values"] for sample in samples()[:8]])
    with torch.no_grad():
        expected = plain.eval()(inputs)["logits"]
    assert torch.allclose(torch.tensor(found), expected, atol=0.05 if "bf16" in setting else 1e-6)


# ---- label smoothing


@pytest.mark.parametrize("share", [None, 1.0, 0.5])
@pytest.mark.parametrize("kind", [Net, Tuples, Ignores, Divides])
def test_a_models_own_loss_is_smoothed_in_training_only(kind: type[Net], share: float | None) -> None:
    model = kind()
    model.dropout.p = 0.0
    session = Session(model, {**RECIPE, "mask": {"kind": "random", "sparsity": 0.5}, "tweaks": RECIPE["tweaks"][-1:]})
    session.attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    items = None if share is None else torch.tensor(6 / share)
    given = {} if items is None or kind in (Net, Tuples) else {"num_items_in_batch": items}

    def loss_and_logits() -> tuple[Tensor, Tensor]:
        outputs = session.smoothing.around(model, pixel_values=images, labels=labels, **given)
        return (outputs["loss"], outputs["logits"]) if isinstance(outputs, dict) else outputs

    factor = share if share is not None and kind is Divides else 1.0
    loss, logits = loss_and_logits()
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(loss, factor * smooth) and session.smoothing.seen
    assert not torch.allclose(smooth, F.cross_entropy(logits, labels), rtol=1e-3)
    model.eval()
    loss, logits = loss_and_logits()
    assert torch.allclose(loss, factor * F.cross_entropy(logits, labels))


def test_smoothing_needs_class_numbers(tmp_path: Path) -> None:
    class Regression(Net):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.logits(pixel_values)
            return {"logits": logits, "loss": F.mse_loss(logits.mean(1), labels)}

    trainer = make(tmp_path, [TostCallback(RECIPE, mask="random", sparsity=0.5)], Regression())
    trainer.train_dataset = [{**sample, "labels": float(sample["labels"])} for sample in samples()]
    with pytest.raises(TostError, match="label_smoothing: expected a training loss that it can act on"):
        trainer.train()


def test_an_own_loss_through_criterion_is_the_same_training(tmp_path: Path) -> None:
    recipe = {
        **RECIPE,
        "tweaks": [RECIPE["tweaks"][0], RECIPE["tweaks"][3]],
        "mask": {"kind": "synflow", "sparsity": 0.6},
    }
    one = make(tmp_path, [TostCallback(recipe)], gradient_accumulation_steps=2, max_steps=3)
    callback = TostCallback(recipe)
    losses: list[float] = []

    def spy(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        losses.append(loss.item())
        return loss

    two = make(
        tmp_path, [callback], Bare(), {"compute_loss_func": callback.criterion(spy)}, gradient_accumulation_steps=2,
        max_steps=3, remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    for trainer in (one, two):
        trainer.model.dropout.p = 0.0
        trainer.train_dataset = samples(32)  # of which no batch is short: means of means are means
        trainer.train()
    for name, value in weights(one.model).items():
        assert torch.allclose(value, two.model.state_dict()[name], atol=1e-5), name
    hard = two.evaluate()["eval_loss"]
    assert hard == pytest.approx(one.evaluate()["eval_loss"], abs=1e-4) and losses[-1] == pytest.approx(hard, abs=1e-6)


def test_an_own_loss_that_nobody_smooths_is_an_error(tmp_path: Path) -> None:
    own = {
        "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(outputs["logits"], labels)
    }
    with pytest.raises(TostError, match=r"pass compute_loss_func=callback\.criterion\(loss_fn\) to the Trainer"):
        make(tmp_path, [TostCallback(RECIPE)], trainer=own).train()


def test_an_optional_smoothing_that_finds_no_loss_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = {
        "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(outputs["logits"], labels)
    }
    callback = TostCallback(RECIPE, tweaks=[{"kind": "label_smoothing", "optional": True}])
    with caplog.at_level(logging.INFO, "tost_plugins"):
        make(tmp_path, [callback], trainer=own, max_steps=3).train()
    assert sum("never came by" in record.getMessage() for record in caplog.records) == 1
    assert callback.session.left_out == ["label_smoothing (the loss never came by)"]


class Weighted(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss = F.cross_entropy(
            model(inputs["pixel_values"])["logits"], inputs["labels"], torch.tensor([100.0, 1, 1, 0.01])
        )
        return (loss, {}) if return_outputs else loss


def test_a_loss_of_the_trainers_own_that_masks_do_not_look_at_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(trainer: type[Trainer], mask: str, **given: Any) -> list[str]:
        caplog.clear()
        tost = TostCallback(MASK_ONLY, mask=mask, sparsity=0.5, **given)
        args = TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        with caplog.at_level(logging.INFO, "tost_plugins"):
            trainer(Net(), args, train_dataset=samples(8), callbacks=[tost]).train()
        return [line for line in caplog.messages if "looked at" in line]

    assert said(Weighted, "snip") == [
        "Weighted.compute_loss: was not looked at, but the loss that the model returns; where that is another one, "
        "TostCallback(criterion=lambda outputs, batch: ...) says so"
    ]
    assert said(Weighted, "random") == said(Trainer, "snip") == []
    own: Any = lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["labels"])  # noqa: E731
    assert said(Weighted, "snip", criterion=own) == []


# ---- what it refuses


def test_what_cannot_work_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = Net()
    before, keys = weights(model), list(model.state_dict())

    with pytest.raises(TostError, match=r"expected to be the only one, got label_smoothing_factor=0\.1; set it to 0"):
        trainer = {"compute_loss_func": lambda *a, **k: None}
        model.config = copy.copy(ResNetConfig())
        make(tmp_path, [TostCallback(RECIPE)], model, trainer, label_smoothing_factor=0.1)
    with pytest.raises(TostError, match="expected one in a Trainer, got several"):
        make(tmp_path, [TostCallback(RECIPE), TostCallback(MASK_ONLY)], model)
    late = make(tmp_path, [], model)
    late.add_callback(TostCallback(RECIPE))
    with pytest.raises(TostError, match=r"got added later; .*write Trainer\(model=model, callbacks="):
        late.train()
    assert not late.evaluate().keys() & {"tost/sparsity"}

    assert list(model.state_dict()) == keys and not differences(weights(model), before) and type(model) is Net


def test_smoothing_that_rests_leaves_it_to_the_trainer(tmp_path: Path) -> None:
    tweaks = [{"kind": "label_smoothing", "least_steps": 4}]
    for steps in (3, 4):
        model, callback = Net(), TostCallback(RECIPE, tweaks=tweaks)
        model.config = copy.copy(ResNetConfig())
        run = make(tmp_path, [callback], model, label_smoothing_factor=0.1, max_steps=steps)
        if steps == 3:
            run.train()
            assert callback.session.left_out == ["label_smoothing (3 steps are fewer than its least_steps, 4)"]
        else:
            with pytest.raises(TostError, match=r"expected to be the only one, got label_smoothing_factor=0\.1"):
                run.train()


def test_a_second_callback_added_later_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, [TostCallback(RECIPE)])
    trainer.add_callback(TostCallback(MASK_ONLY))
    with pytest.raises(TostError, match="expected one in a Trainer, got several"):
        trainer.train()


def test_model_init_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, [TostCallback(RECIPE)], trainer={"model_init": lambda: Net()})
    with pytest.raises(TostError, match="model_init makes it anew"):
        trainer.train()


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(TostError, match="one process per GPU, got one for 2"):
        make(tmp_path, [TostCallback(RECIPE)])


def test_without_a_trainer_there_is_no_session() -> None:
    with pytest.raises(TostError, match="expected a Trainer with this callback, got none"):
        _ = TostCallback(RECIPE).session


# ---- checkpoints


@pytest.mark.parametrize("step", [1, GHOSTS_END, 5, 8])
def test_resuming_ends_where_the_whole_run_ended(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor], Mask], step: int
) -> None:
    folder, end, mask = whole
    callback = TostCallback(RECIPE)
    trainer = make(tmp_path, [callback], Net(seed=7))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert not differences(weights(trainer.model), end)
    assert not differences(dict(callback.session.mask), dict(mask))
    assert callback.session.state == "finished" and type(trainer.model) is Net


def test_resuming_with_restored_callbacks(tmp_path: Path, whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    folder, end, _ = whole
    callback = TostCallback(RECIPE)
    trainer = make(tmp_path, [callback], Net(seed=7), restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert callback not in trainer.callback_handler.callbacks
    assert not differences(weights(trainer.model), end) and callback.session.state == "finished"
    assert isinstance(trainer.callback_handler.callbacks[0], TostCallback)
    assert "tost/ghost_skip/alpha" in trainer.state.log_history[-1]


def test_a_longer_run_keeps_the_schedules_it_began_with(
    tmp_path: Path, whole: tuple[Path, dict[str, Tensor], Mask]
) -> None:
    callback, alphas = TostCallback(RECIPE), {}
    look = Each(
        lambda state, kwargs: alphas.update({state.global_step: callback.session.metrics()["tost/ghost_skip/alpha"]})
    )
    trainer = make(tmp_path, [callback, look], Net(seed=7), max_steps=3 * STEPS)
    trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-1"))
    assert callback.session.clock.total_steps == STEPS and trainer.state.global_step == 3 * STEPS
    assert [step for step, alpha in alphas.items() if alpha > 0] == list(range(2, GHOSTS_END))


def test_checkpoints_of_another_recipe_are_refused(tmp_path: Path, whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    checkpoint = str(whole[0] / "checkpoint-2")
    other = {**RECIPE, "mask": {"kind": "snip", "sparsity": 0.5}}
    with pytest.raises(TostError, match="expected a checkpoint of the same mask"):
        make(tmp_path, [TostCallback(other)]).train(resume_from_checkpoint=checkpoint)
    make(tmp_path, [], max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(TostError, match="expected a checkpoint of a run with TostCallback, got one without"):
        make(tmp_path, [TostCallback(MASK_ONLY)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_model_is_one_of_the_plain_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, trainer = TostCallback(RECIPE), None
    worse = {"compute_metrics": lambda found: {"score": -trainer.state.global_step}}
    trainer = make(
        tmp_path, [callback], trainer=worse, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "tost_plugins"):
        trainer.train()
    assert trainer.state.best_global_step == SOFT_ENDS and trainer.state.best_metric == -SOFT_ENDS
    assert any("the best from step 6 on" in record.getMessage() for record in caplog.records)
    assert not any("changes abruptly" in record.getMessage() for record in caplog.records)
    best = make(tmp_path / "other", [TostCallback(RECIPE)], Net(seed=7))
    best._load_from_checkpoint(str(tmp_path / f"checkpoint-{SOFT_ENDS}"))
    expected = weights(best.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer.model).items())
    assert outside(trainer.model, callback.session.mask) == 0 and list(trainer.model.state_dict()) == list(
        Net().state_dict()
    )


def test_the_best_before_a_resume_is_forgotten_too(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None) -> Trainer:
        trainer: Any = None
        metrics = {"compute_metrics": lambda found: {"score": -trainer.state.global_step}}
        trainer = make(
            folder, [TostCallback(RECIPE)], trainer=metrics, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(tmp_path, None)
    assert run(tmp_path, str(tmp_path / "checkpoint-4")).state.best_global_step == SOFT_ENDS


def test_a_finished_model_does_not_go_on_from_a_checkpoint_with_soft_activations(tmp_path: Path) -> None:
    """With ghosts the Trainer itself refuses: its optimizer has other parameters then."""
    trainer = make(tmp_path, [TostCallback(RECIPE, tweaks=RECIPE["tweaks"][1:2])], save_strategy="steps", save_steps=1)
    trainer.train()
    expected = weights(trainer.model)
    with pytest.raises(TostError, match=f"soft activations have ended, got step {SOFT_ENDS - 1} for a model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SOFT_ENDS - 1}"))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SOFT_ENDS}"))
    assert not differences(weights(trainer.model), expected)


@pytest.mark.parametrize(
    ("mask", "best"),
    [
        ({"kind": "dnw", "sparsity": 0.6}, 1),
        ({"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "6ba"}, 6),
        ({"kind": "gradual", "sparsity": 0.6, "every": "2ba", "until": "6ba"}, 6),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_best_model_has_the_mask_that_it_had_then(tmp_path: Path, mask: dict[str, Any], best: int) -> None:
    trainer: Any = None
    callback = TostCallback({"mask": mask})
    masks: dict[int, Mask] = {}
    look = Each(lambda state, kwargs: masks.update({state.global_step: callback.session.mask}))
    trainer = make(
        tmp_path, [callback, look], trainer={"compute_metrics": lambda found: {"score": -trainer.state.global_step}},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == best and callback.session.mask == masks[best]
    assert Mask.from_zeros(prunable(trainer.model)) == masks[best] and masks[best].sparsity == pytest.approx(
        0.6, abs=1e-2
    )
    assert list(trainer.model.state_dict()) == list(Net().state_dict())
    assert (masks[best] == masks[STEPS]) == (mask["kind"] != "dnw")


def test_the_best_model_may_be_from_before_sharpness_ends(tmp_path: Path) -> None:
    """At every step the network is the plain one."""
    trainer: Any = None
    sharp = {"kind": "sharpness", "until": "6ba"}
    trainer = make(
        tmp_path, [TostCallback({"mask": {"kind": "random", "sparsity": 0.6}, "tweaks": [sharp]})],
        trainer={"compute_metrics": lambda found: {"score": -trainer.state.global_step}}, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1 and list(trainer.model.state_dict()) == list(Net().state_dict())


def test_a_mask_object_and_deep_copies(tmp_path: Path) -> None:
    mask = Mask({name: torch.rand_like(param) > 0.7 for name, param in prunable(Net()).items()})
    callback, copies = TostCallback(RECIPE, mask=mask), []
    look = Each(lambda state, kwargs: copies.append(copy.deepcopy(kwargs["model"])))
    make(tmp_path, [callback, look], max_steps=2).train()
    assert not differences(dict(callback.session.mask), dict(mask))
    assert mixins_of(copies[0]) and copies[0](torch.randn(2, 3, 8, 8))["logits"].shape == (2, 4)


# ---- several ranks


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pytest.raises(
        TostError, match=r"expected one process or DDP, got DEEPSPEED, .*; use torchrun without fsdp"
    )
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args.deepspeed = {"zero_optimization": {"stage": 1}}  # given to the constructor it asks for the package
    net, keys = Net(), list(Net().state_dict())
    with expected:
        Trainer(model=net, args=args, callbacks=[TostCallback(RECIPE)])
    made = make(tmp_path, [])
    for state in (PartialState, AcceleratorState):  # as `accelerate launch` has it, with GPUs and the package
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with expected:
        TostCallback(RECIPE).on_init_end(made.args, made.state, made.control, model=net)
    assert list(net.state_dict()) == keys


def test_two_ranks_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(RANK), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(RANK.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    first, second = (found["runs"] for found in ranks)
    for case in first:
        assert not differences(first[case]["mask"], second[case]["mask"]), case
        assert not differences(first[case]["weights"], second[case]["weights"]), case
        assert first[case]["states"] == second[case]["states"] and len(set(first[case]["states"])) > 3, case
        assert first[case]["alphas"] == second[case]["alphas"] and first[case]["plain"] and second[case]["plain"]
        assert [Mask(mask) for mask in first[case]["masks"]] == [Mask(mask) for mask in second[case]["masks"]], case
    rigl, dnw = ([Mask(mask) for mask in first[kind]["masks"]] for kind in ("rigl", "dnw"))
    assert rigl[0] == rigl[1] != rigl[2] == rigl[3] != rigl[4] and dnw[0] != dnw[-1]
    assert not differences(first["unused"]["mask"], first["strict"]["mask"])
    assert not differences(first["whole"]["weights"], first["resumed"]["weights"])
    assert not differences(first["whole"]["weights"], first["static"]["weights"])  # labels smoothed there too
    assert first["whole"]["states"][3:] == first["resumed"]["states"]
    for found in ranks:
        assert found["runs"]["whole"]["sent"] == found["sent"] and sum(found["sent"].values()) >= 3
        assert len(found["refused"]) == 2
        evaluated, _, not_evaluated = " ".join(found["by themselves"]).partition("----")
        assert ("expected the model in DDP, got 2 processes" in evaluated) == (
            found is ranks[0]
        )  # rank 0 speaks for all
        assert "expected the model in DDP" not in not_evaluated
        assert all(text.startswith("TostCallback: expected one process or DDP, got FSDP") for text in found["refused"])


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)), 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += self.training  # it is looked at once in eval mode, for what its mask connects
            return {"loss": F.cross_entropy(self.body(x), labels) * (float("nan") if self.calls == 2 else 1)}

    net, data = Nan(), [{"x": torch.randn(3, 6, 6), "labels": number % 4} for number in range(16)]
    tost = TostCallback({"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": ["soft_activation"]})
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", max_grad_norm=0,
    )  # fmt: skip
    with pytest.raises(TostError, match=r"step 1: expected finite gradients, got NaN or Inf in body\.0\.weight"):
        Trainer(model=net, args=args, train_dataset=data, callbacks=[tost]).train()
    assert tost.session.clock.step == 1 and all(bool(torch.isfinite(param).all()) for param in net.parameters())
