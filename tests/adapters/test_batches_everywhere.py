"""Streams, and networks that are called and trained in ways of their own, in every trainer: the mask that `masks.find` finds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tost_plugins import Mask, Session, masks

STEPS = 4
RECIPE = {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []}


class Stream(IterableDataset):
    """Samples without a number, named as the network's inputs are."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draws = torch.Generator().manual_seed(0)
        return ({"x": torch.randn(8, generator=draws), "labels": i % 4} for i in range(8 * STEPS))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.fc(F.relu(self.body(x)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def own_forward(model: Any, batch: Any) -> Tensor:
    return model(batch["x"] * 2)["logits"]


def own_criterion(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, (batch["labels"] + 1) % 4)


def loop(net: nn.Module, how: dict[str, Any], folder: Path) -> Mask:
    optimizer, loader = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(Stream(), 8)
    session = Session(net, RECIPE)
    with session.drive(optimizer, loader, total_steps=STEPS, **how):
        for batch in loader:
            net(**batch)["loss"].backward()
            optimizer.step()
    assert session.clock.step == STEPS
    return session.mask


def accelerate(net: nn.Module, how: dict[str, Any], folder: Path) -> Mask:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    accelerator = Accelerator(cpu=True)
    tost = TostHook(RECIPE, accelerator)
    tost.attach(net)
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(Stream(), 8)
    )
    tost.start(optimizer, loader, total_steps=STEPS, **how)
    for batch in loader:
        accelerator.backward(net(**batch)["loss"])
        optimizer.step()
    assert tost.session.clock.step == STEPS
    tost.finish()
    return tost.session.mask


def transformers(net: nn.Module, how: dict[str, Any], folder: Path) -> Mask:
    from transformers import Trainer, TrainingArguments

    from tost_plugins import TostCallback

    tost = TostCallback(RECIPE, **how)
    args = TrainingArguments(str(folder), max_steps=STEPS, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True,
                             report_to=[], save_strategy="no")  # fmt: skip
    trainer = Trainer(net, args, train_dataset=Stream(), callbacks=[tost])
    trainer.train()
    assert trainer.state.global_step == STEPS
    return tost.session.mask


def composer(net: nn.Module, how: dict[str, Any], folder: Path) -> Mask:
    from composer import ComposerModel, Trainer

    from tost_plugins import TostAlgorithm

    class Wrapped(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Any) -> Any:
            return self.net(**batch)

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return outputs["loss"]

    tost, model = TostAlgorithm(RECIPE), Wrapped()
    trainer = Trainer(model=model, train_dataloader=DataLoader(Stream(), 8), max_duration=f"{STEPS}ba", algorithms=[tost],
                      optimizers=torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", progress_bar=False)  # fmt: skip
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == STEPS
    return Mask({name.removeprefix("net."): mask for name, mask in tost.session.mask.items()})


def lightning(net: nn.Module, how: dict[str, Any], folder: Path) -> Mask:
    from lightning.pytorch import LightningModule, Trainer

    from tost_plugins import TostLightning

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = net

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return self.module(x, labels)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tost = TostLightning(RECIPE, **how)
    trainer = Trainer(max_epochs=1, max_steps=STEPS, callbacks=[tost], accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Module(), DataLoader(Stream(), 8))
    assert trainer.global_step == STEPS
    return tost.session.mask


TRAINERS: list[Callable[..., Mask]] = [loop, accelerate, transformers, lightning, composer]


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_streams_train_to_their_end(trainer: Callable[..., Mask], tmp_path: Path) -> None:
    if trainer is not loop:
        pytest.importorskip(trainer.__name__)
    assert trainer(Net(), {}, tmp_path) == masks.find(Net(), "snip", 0.5, DataLoader(Stream(), 8))


@pytest.mark.parametrize("trainer", TRAINERS[:4], ids=lambda trainer: trainer.__name__)
def test_a_forward_and_a_loss_of_ones_own(trainer: Callable[..., Mask], tmp_path: Path) -> None:
    if trainer is not loop:
        pytest.importorskip(trainer.__name__)
    how = {"forward": own_forward, "criterion": own_criterion}
    found = trainer(Net(), how, tmp_path)
    assert found == masks.find(Net(), "snip", 0.5, DataLoader(Stream(), 8), **how)
    assert found != masks.find(Net(), "snip", 0.5, DataLoader(Stream(), 8))
