"""Half a run with a checkpoint, and the other half, in each trainer, on as many ranks as there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tost_plugins import Session
from tost_plugins.training import ranks
from tost_plugins.training.params import prunable

MIDDLE, STEPS = 3, 6
RECIPE = {
    "mask": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "5ba", "drop": 0.5},
    "tweaks": [{"kind": "ghost_skip", "until": "5ba"}, {"kind": "soft_activation", "until": "1dur"}],
}


class Net(nn.Module):
    """Two convolutions with norms, for batches of pairs and, as the Hub's models, of columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(pixel_values)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def samples() -> TensorDataset:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(64) % 4)


class Seen:
    """What came out: alpha after each step, and the network with its mask at the end of this half."""

    def __init__(self) -> None:
        self.alphas: list[float] = []

    def step(self, session: Session) -> None:
        self.alphas.append(session.metrics()["tost/ghost_skip/alpha"])

    def end(self, session: Session, net: nn.Module) -> dict[str, Any]:
        kept = {name: param.detach().clone() for name, param in prunable(net).items()}
        outside = max(float((value * ~session.mask[name]).abs().max()) for name, value in kept.items())
        return {"alphas": self.alphas, "mask": dict(session.mask), "weights": kept, "outside": outside,
                "plain": list(net.state_dict()) == list(Net().state_dict())}  # fmt: skip


def run(trainer: str, folder: Path, second: bool) -> dict[str, Any]:
    """The first half of a run, which leaves a checkpoint in the folder, or the second."""
    runs = {"torch": _torch, "accelerate": _accelerate, "transformers": _transformers, "composer": _composer,
            "lightning": _lightning}  # fmt: skip
    return runs[trainer](folder, second)


def _torch(folder: Path, second: bool) -> dict[str, Any]:
    net, seen = Net(), Seen()
    session = Session(net, RECIPE).attach()
    optimizer, step = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), 0
    parts = {"net": net, "optimizer": optimizer, "session": session}
    if second:
        saved, step = torch.load(folder / "last.pt", weights_only=True), MIDDLE
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    sampler = DistributedSampler(samples(), ranks.world(), ranks.rank(), shuffle=False)
    batches = list(DataLoader(samples(), 8, sampler=sampler))
    wrapped = nn.parallel.DistributedDataParallel(net) if ranks.world() > 1 else net
    session.start(optimizer, batches, total_steps=STEPS)
    for number in range(step, STEPS if second else MIDDLE):
        images, labels = batches[number % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images), labels).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        seen.step(session)
    if second:
        session.finish()
    elif ranks.rank() == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "last.pt")
    return seen.end(session, net)


def _accelerate(folder: Path, second: bool) -> dict[str, Any]:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    accelerator, net, seen, step = Accelerator(cpu=True), Net(), Seen(), 0
    tost = TostHook(RECIPE, accelerator)
    tost.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(net, optimizer, DataLoader(samples(), 8))
    if second:
        accelerator.load_state(str(folder / "state"))
        step = tost.session.saved_step()
    tost.start(optimizer, batches, total_steps=STEPS)
    while step < (STEPS if second else MIDDLE):
        for images, labels in batches:
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            seen.step(tost.session)
            step += 1
            if step == (STEPS if second else MIDDLE):
                break
    tost.finish() if second else accelerator.save_state(str(folder / "state"))
    return seen.end(tost.session, net)


def _transformers(folder: Path, second: bool) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tost_plugins import TostCallback

    tost, seen, net = TostCallback(RECIPE), Seen(), Net()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.step(tost.session)
            if state.global_step == MIDDLE and not second:
                control.should_save = control.should_training_stop = True

    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=STEPS, use_cpu=True, report_to="none",
        learning_rate=0.05, optim="sgd", disable_tqdm=True, save_strategy="no", ddp_find_unused_parameters=False,
    )  # fmt: skip
    columns = [{"pixel_values": image, "labels": int(label)} for image, label in samples()]
    trainer = Trainer(model=net, args=args, train_dataset=columns, callbacks=[tost, Watch()])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{MIDDLE}") if second else None)
    return seen.end(tost.session, net)


def _composer(folder: Path, second: bool) -> dict[str, Any]:
    from composer import Callback, Trainer
    from composer.models import ComposerClassifier
    from composer.utils import dist

    from tost_plugins import TostAlgorithm

    algorithm, seen, net = TostAlgorithm(RECIPE), Seen(), Net()

    class Watch(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            seen.step(algorithm.session)
            if int(state.timestamp.batch) == MIDDLE and not second:
                state.stop_training()

    model = ComposerClassifier(net, num_classes=4)
    sampler = dist.get_sampler(samples(), shuffle=False)
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(samples(), 8, sampler=sampler), max_duration=f"{STEPS}ba", device="cpu",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), algorithms=[algorithm],
        callbacks=[Watch()], progress_bar=False, seed=7, save_folder=str(folder), save_filename="ba{batch}.pt",
        save_interval=f"{MIDDLE}ba", save_overwrite=True, load_path=str(folder / f"ba{MIDDLE}.pt") if second else None,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return seen.end(algorithm.session, net)


def _lightning(folder: Path, second: bool) -> dict[str, Any]:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from tost_plugins import TostLightning

    tost, seen, net = TostLightning(RECIPE, total_steps=STEPS), Seen(), Net()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = net

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.module(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.step(tost.session)
            if trainer.global_step == MIDDLE and not second:
                trainer.save_checkpoint(folder / "middle.ckpt")
                trainer.fit_loop.epoch_loop.max_steps = MIDDLE

    trainer = Trainer(
        max_epochs=-1, max_steps=STEPS, callbacks=[Watch(), tost], accelerator="cpu", devices=max(1, ranks.world()), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(samples(), 8), ckpt_path=folder / "middle.ckpt" if second else None)
    return seen.end(tost.session, net)
