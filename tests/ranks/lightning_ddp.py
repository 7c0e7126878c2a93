"""One of several ranks: trains with TostLightning under DDP and writes what came out to FOLDER/<rank>.pt. With `spawn` in place
of a folder: one process, whose Trainer makes the others."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from watch import Watch

from tost_plugins import TostError, TostLightning
from tost_plugins.training.params import prunable

RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.6},
    "tweaks": [
        {"kind": "ghost_skip", "until": "0.3dur"},
        {"kind": "soft_activation", "until": "0.6dur"},
        {"kind": "rescaled_init", "iterations": 2},
        {"kind": "label_smoothing", "alpha": 0.1},
    ],
}
MOVING = {
    "rigl": {"mask": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "6ba", "drop": 0.5}},
    "dnw": {"mask": {"kind": "dnw", "sparsity": 0.6}},
}
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
                         "devices": 2}  # fmt: skip


class Net(LightningModule):
    """Two convolutions with norms."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Notes(Callback):
    """Notes alpha, the mask, and a digest of all that is trained after every step."""

    def __init__(self, tost: TostLightning | None, counts: bool) -> None:
        self.tost, self.alphas, self.masks, self.watch = tost, [], [], Watch(counts)
        self.step = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.watch(module, trainer.optimizers[0], self.tost and self.tost.session)
        if self.tost is not None:
            self.alphas.append(self.tost.session.metrics().get("tost/ghost_skip/alpha"))
            self.masks.append(dict(self.tost.session.mask))


def train(
    folder: Path, resume: Path | None = None, recipe: Any = RECIPE, accumulate: int = 1, **ddp: Any
) -> dict[str, Any]:
    """A run of 7 steps, without a recipe one without ToST; every rank starts from other weights, as scripts without a seed do."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 8, 8, generator=generator), torch.arange(32) % 4)
    tost, rank = TostLightning(recipe) if recipe else None, dist.get_rank() if dist.is_initialized() else 0
    notes, model = Notes(tost, counts=folder.name in ("whole", "untouched")), Net(seed=rank)
    trainer = Trainer(
        max_epochs=-1, max_steps=7, accumulate_grad_batches=accumulate, strategy=DDPStrategy(process_group_backend="gloo", **ddp),
        callbacks=[*([tost] if tost else []), notes, ModelCheckpoint(dirpath=folder, every_n_train_steps=4, filename="{step}")],
        **QUIET,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True), ckpt_path=resume)
    assert trainer.world_size == 2 and trainer.global_step == 7
    if tost is None:
        return {"sent": notes.watch.sent}
    kept = {name: param.detach() for name, param in prunable(model).items()}
    return {
        "mask": dict(tost.session.mask),
        "weights": {name: param.detach() for name, param in model.named_parameters()},
        "alphas": notes.alphas,
        "masks": notes.masks,
        "states": notes.watch.states,
        "sent": notes.watch.sent,
        "plain": list(model.state_dict()) == list(Net(0).state_dict())
        and not any(value[~tost.session.mask[name]].any() for name, value in kept.items()),
    }


def spawned() -> None:
    """What a Trainer says that makes its processes itself."""
    trainer = Trainer(
        strategy="ddp_spawn", max_steps=1, callbacks=[TostLightning(RECIPE)], enable_checkpointing=False, **QUIET
    )
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    try:
        trainer.fit(Net(0), DataLoader(data, batch_size=4))
    except Exception as error:
        print(TostError.__name__, str(error).strip().splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1] == "spawn":
        spawned()
        sys.exit()
    folder = Path(sys.argv[1])
    found = {
        "unused": train(folder / "unused", find_unused_parameters=True),
        "whole": train(folder / "whole"),
        "static": train(folder / "static", static_graph=True),
        "resumed": train(folder / "resumed", folder / "whole" / "step=4.ckpt"),
    }
    for kind, recipe in MOVING.items():
        found[kind] = train(folder / kind, None, recipe, accumulate=2)
    torch.save(
        {"runs": found, "sent": train(folder / "untouched", None, None)["sent"]}, folder / f"{dist.get_rank()}.pt"
    )
    leave()
