"""One way to smooth labels in all trainers: whatever computes the training loss, one step is that of torch's own smoothing,
or the hard one where the loss is another, which is said."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tost_plugins import Session

ALPHA, LEFT_OUT = 0.1, "label_smoothing (the loss"
RECIPE = {
    "mask": {"kind": "random", "sparsity": 0.0},
    "tweaks": [{"kind": "label_smoothing", "alpha": ALPHA, "optional": True}],
}
Loss = Callable[[Tensor, Tensor], Tensor]
Done = tuple[nn.Module, Session]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh(), nn.Conv2d(5, 4, 1))


def classes() -> Tensor:
    return torch.tensor([0, 1, -100, 3, 2, 1, -100, 0])


def pixels() -> Tensor:
    labels = torch.arange(32).remainder(4).view(8, 2, 2)
    labels[:3, 0] = -100
    return labels


WEIGHT = torch.tensor([0.1, 1.0, 4.0, 2.0])


def focal(x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(x, y, reduction="none")
    return ((1 - torch.exp(-each)) * each).mean()


#: kind -> network, labels, the loss as a user writes it, the loss that is to be trained on, whether it is smoothed.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Loss, Loss, bool]] = {
    "classes": (
        classifier, classes, F.cross_entropy, lambda x, y: F.cross_entropy(x, y, label_smoothing=ALPHA), True
    ),
    "weights": (
        classifier, classes, nn.CrossEntropyLoss(WEIGHT), nn.CrossEntropyLoss(WEIGHT, label_smoothing=ALPHA), True
    ),
    "pixels": (
        segmenter, pixels, lambda x, y: F.cross_entropy(x, y, reduction="none").sum() / (y != -100).sum(),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=ALPHA), True
    ),
    "penalty": (
        classifier, classes, lambda x, y: F.cross_entropy(x, y) + 0.1 * x.square().mean(),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=ALPHA) + 0.1 * x.square().mean(), True
    ),
    "focal": (classifier, lambda: classes().clamp(min=0), focal, focal, False),
    "regression": (
        classifier, lambda: torch.arange(8) * 10.0, lambda x, y: F.mse_loss(x[:, 0], y) / 100,
        lambda x, y: F.mse_loss(x[:, 0], y) / 100, False
    ),
}  # fmt: skip


def inputs() -> Tensor:
    return torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(2))


def plain(net: nn.Module, loss_fn: Loss, labels: Tensor, folder: Path) -> Done:
    session, optimizer = Session(net, RECIPE), torch.optim.SGD(net.parameters(), 1.0)
    with session.drive(optimizer, total_steps=1):
        session.criterion(loss_fn)(net(inputs()), labels).backward()
        optimizer.step()
    return net, session


def accelerate(net: nn.Module, loss_fn: Loss, labels: Tensor, folder: Path) -> Done:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    accelerator = Accelerator(cpu=True)
    tost = TostHook(RECIPE, accelerator)
    tost.attach(net)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 1.0))
    tost.start(optimizer, total_steps=1)
    accelerator.backward(tost.criterion(loss_fn)(model(inputs()), labels))
    optimizer.step()
    tost.finish()
    return net, tost.session


def composer(net: nn.Module, loss_fn: Loss, labels: Tensor, folder: Path, inside: bool = False) -> Done:
    from composer import ComposerModel, Trainer

    from tost_plugins import TostAlgorithm

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Any) -> Any:
            logits = self.net(batch[0])
            return {"loss": loss_fn(logits, batch[1]), "logits": logits} if inside else logits

        def loss(self, outputs: Any, batch: Any) -> Any:
            return outputs["loss"] if inside else loss_fn(outputs, batch[1])

    model, tost = Model(), TostAlgorithm(RECIPE)
    Trainer(
        model=model, train_dataloader=DataLoader(list(zip(inputs(), labels, strict=True)), 8), max_duration="1ba",
        algorithms=[tost], optimizers=torch.optim.SGD(net.parameters(), 1.0), device="cpu", progress_bar=False,
    ).fit()  # fmt: skip
    assert "loss" not in vars(model) and not model._forward_hooks and not model._forward_pre_hooks
    return net, tost.session


def composer_inside(*args: Any) -> Done:
    return composer(*args, inside=True)


def transformers(net: nn.Module, loss_fn: Loss, labels: Tensor, folder: Path, where: str = "function") -> Done:
    from transformers import Trainer, TrainingArguments

    from tost_plugins import TostCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.net(x)
            return {"logits": logits} if labels is None else {"loss": loss_fn(logits, labels), "logits": logits}

    class Overridden(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return loss_fn(model(x=inputs["x"])["logits"], inputs["labels"])

    tost = TostCallback(RECIPE)
    trainer = (Overridden if where == "overridden" else Trainer)(
        Model(),
        TrainingArguments(
            str(folder), max_steps=1, per_device_train_batch_size=8, max_grad_norm=0, lr_scheduler_type="constant",
            use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(inputs(), labels, strict=True)], callbacks=[tost],
        optimizers=(torch.optim.SGD(net.parameters(), 1.0), None),
        compute_loss_func=tost.criterion(loss_fn) if where == "function" else None,
    )  # fmt: skip
    trainer.train()
    assert trainer.compute_loss.__func__ is type(trainer).compute_loss
    return net, tost.session


def transformers_inside(*args: Any) -> Done:
    return transformers(*args, where="inside")


def transformers_overridden(*args: Any) -> Done:
    return transformers(*args, where="overridden")


WAYS = {
    way.__name__: way
    for way in (
        plain, accelerate, composer, composer_inside, transformers, transformers_inside, transformers_overridden,
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_one_step_is_that_of_torchs_own_smoothing(
    way: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if way != "plain":
        pytest.importorskip(way.split("_")[0])
    make, labels, loss_fn, wanted, smoothed = KINDS[kind]
    torch.manual_seed(1)
    net = make()
    twin = copy.deepcopy(net)
    wanted(twin(inputs()), labels()).backward()
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        net, session = WAYS[way](net, loss_fn, labels(), tmp_path)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)
    left = session.report().left_out
    lines = [record.getMessage() for record in caplog.records if record.name == "tost_plugins"]
    assert (left, lines) == ((), []) if smoothed else (len(lines) == len(left) == 1 and left[0].startswith(LEFT_OUT))


@pytest.mark.parametrize("kind", ["classes", "pixels"])
def test_micro_batches_of_the_hugging_face_trainer_count_their_labels(kind: str, tmp_path: Path) -> None:
    """Two of 4 samples, of which other numbers count, are one batch of 8."""
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from tost_plugins import TostCallback

    make, labels, loss_fn, wanted, _ = KINDS[kind]
    torch.manual_seed(1)
    net = make()
    twin = copy.deepcopy(net)
    wanted(twin(inputs()), labels()).backward()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x)}

    tost = TostCallback(RECIPE)
    Trainer(
        Model(),
        TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0,
            lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no",
            remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=False,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(inputs(), labels(), strict=True)], callbacks=[tost],
        optimizers=(torch.optim.SGD(net.parameters(), 1.0), None), compute_loss_func=tost.criterion(loss_fn),
    ).train()  # fmt: skip
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)
