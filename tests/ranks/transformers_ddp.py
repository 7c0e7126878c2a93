"""One of several ranks: trains with TostCallback under DDP and writes what came out to FOLDER/<rank>.pt."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from leave import leave
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from watch import Watch

from tost_plugins import TostCallback, TostError
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


class Net(nn.Module):
    """Two convolutions with norms; returns its loss like a model of the Hub."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Notes(TrainerCallback):
    """Notes alpha, the mask, and a digest of all that is trained after every step."""

    def __init__(self, tost: TostCallback | None, counts: bool) -> None:
        self.tost, self.alphas, self.masks, self.watch = tost, [], [], Watch(counts)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.watch(model, optimizer.optimizer, self.tost and self.tost.session)
        if self.tost is None:
            return
        self.alphas.append(self.tost.session.metrics().get("tost/ghost_skip/alpha"))
        self.masks.append(dict(self.tost.session.mask))


def train(folder: Path, resume: str | None = None, recipe: Any = RECIPE, **settings: Any) -> dict[str, Any]:
    """A run of 7 steps, without a recipe one without ToST; every rank starts from other weights, as scripts without a seed do."""
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 4} for i in range(32)]
    tost, rank = TostCallback(recipe) if recipe else None, dist.get_rank() if dist.is_initialized() else 0
    notes = Notes(tost, counts=folder.name in ("whole", "untouched"))
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=7, use_cpu=True, report_to="none",
        learning_rate=0.05, optim="sgd", disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    model = Net(seed=rank)
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[tost, notes] if tost else [notes])
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=resume)
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


def by_themselves(folder: Path) -> list[str]:
    """What is said where a Trainer has evaluated before it trains, after which it uses no DDP; and where it has not."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("tost_plugins").addHandler(handler)
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 4} for i in range(16)]
    for evaluates in (True, False):
        args = TrainingArguments(
            output_dir=str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        model, recipe = Net(seed=0), {"mask": {"kind": "random", "sparsity": 0.5}}
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[TostCallback(recipe)])
        if evaluates:
            trainer.evaluate()
        trainer.train()
        said.append("----")
    return said


def refused(folder: Path) -> list[str]:
    """What a Trainer with either kind of FSDP says."""
    found = []
    for version in (1, 2):
        try:
            train(folder, fsdp="full_shard", fsdp_config={"version": version, "sync_module_states": False})
        except TostError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    strict, saved = {"ddp_find_unused_parameters": False}, {"save_strategy": "steps", "save_steps": 3}
    found = {
        "unused": train(folder / "unused", ddp_find_unused_parameters=True),
        "strict": train(folder / "strict", **strict, gradient_accumulation_steps=2),
        "whole": train(folder / "whole", **strict, **saved),
        "static": train(folder / "static", **strict, ddp_static_graph=True),
        "resumed": train(folder / "resumed", str(folder / "whole" / "checkpoint-3"), **strict),
    }
    for kind, recipe in MOVING.items():
        found[kind] = train(folder / kind, None, recipe, **strict, gradient_accumulation_steps=2)
    extra = {
        "sent": train(folder / "untouched", None, None, **strict, **saved)["sent"],
        "refused": refused(folder / "fsdp"),
        "by themselves": by_themselves(folder / "evaluated"),
    }
    torch.save({"runs": found, **extra}, folder / f"{dist.get_rank()}.pt")
    leave()
