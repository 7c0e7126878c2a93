"""Small networks, batches and one instance of every mask method, for the tests of masks."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins.masks import MASKS, Mask
from tost_plugins.training.task import Task

# What each method is tried with; "file" is added by `methods`, which knows a path.
OPTIONS = {
    "auto": {"sparsity": 0.8},
    "from_zeros": {},
    "random": {"sparsity": 0.8},
    "magnitude": {"sparsity": 0.8},
    "snip": {"sparsity": 0.8, "batches": 2},
    "grasp": {"sparsity": 0.8, "per_class": 4},
    "synflow": {"sparsity": 0.8, "rounds": 5},
    "eoi": {"sparsity": 0.8},
    "gradual": {"sparsity": 0.9, "initial": 0.8},
    "set": {"sparsity": 0.8},
    "rigl": {"sparsity": 0.8},
    "snfs": {"sparsity": 0.8},
    "selfish": {"sparsity": 0.8},
    "dnw": {"sparsity": 0.8},
    "top_kast": {"sparsity": 0.8},
    "ac_dc": {"sparsity": 0.8, "begin": "0ba"},
    "edge_popup": {"sparsity": 0.8},
}
RANDOM = ("random", "eoi", "set", "rigl", "snfs", "selfish", "edge_popup")  # those whose first mask is drawn
WITH_SPARSITY = sorted(kind for kind, options in OPTIONS.items() if "sparsity" in options)
IN_ROUNDS = {"lottery_ticket"}  # found by several trainings, not in one call: tests/test_lottery_ticket.py
KINDS = sorted(MASKS.keys() - IN_ROUNDS)


def net(seed: int = 0) -> nn.Module:
    """Convolutions (one depthwise) with norms, dropout and a classifier: 3x8x8 images, 4 classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    for layer in (model[0], model[3], model[8]):
        nn.init.normal_(layer.weight, std=0.3)  # alike, so that none loses everything to a global threshold
    return model


def batches(count: int = 3, size: int = 12, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size).add(turn) % 4) for turn in range(count)
    ]


def zeroed(model: nn.Module, ignore: tuple[str, ...] = ()) -> nn.Module:
    """The model with every second weight of its prunable layers set to 0."""
    with torch.no_grad():
        for param in Task.of(model, ignore).params.values():
            param.view(-1)[::2] = 0
    return model


def method(kind: str, folder, model: nn.Module, **more) -> object:
    """The method of this kind as `OPTIONS` has it; the file that "file" reads is the model's zeros."""
    if kind == "file":
        path = str(folder / "mask.safetensors")
        Mask.from_zeros(Task.of(model).params).save(path)
        return MASKS[kind](path=path, **more)
    if kind == "gradual" and "sparsity" in more:  # the mask that a run starts with is the one at `initial`
        more = {"initial": more["sparsity"], **more}
    return MASKS[kind](**{**OPTIONS[kind], **more})


class Pictures(nn.Module):
    """Called and answering as the models of Hugging Face are: keywords in, an object with loss and logits
    out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.body(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Unpacking(nn.Module):
    """Called as the models of Composer are: with the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.module = net()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, _ = batch
        return self.module(inputs)


def unpacking_task(given: list[tuple[Tensor, Tensor]] | None, model: nn.Module | None = None) -> Task:
    return Task.of(
        model or Unpacking(),
        batches=given,
        forward=lambda call, batch: call(batch),
        criterion=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    )
