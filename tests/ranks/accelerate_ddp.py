"""One of several ranks: trains with TostHook under DDP and writes what came out to FOLDER/<rank>.pt."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import skip_first_batches
from leave import leave
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from watch import Watch

from tost_plugins import TostHook
from tost_plugins.training.params import prunable

PER_EPOCH, STEPS, MIDDLE = 4, 7, 3
SEEDED = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=1)
RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.6},
    "tweaks": [
        {"kind": "ghost_skip", "until": "0.3dur"},
        {"kind": "soft_activation", "until": "0.6dur"},
        {"kind": "rescaled_init", "iterations": 5},
        {"kind": "label_smoothing", "alpha": 0.1},
    ],
}
#: RigL moves with steps 3 and 5.
MOVING = {
    "rigl": {"mask": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "6ba", "drop": 0.5}},
    "dnw": {"mask": {"kind": "dnw", "sparsity": 0.6}},
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def loader() -> DataLoader:
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(32) % 4), 4, shuffle=True)


def look(folder: Path) -> dict[str, Any]:
    return {"measures": ["in_degree", "activation_sparsity"], "every": "3ba", "out": str(folder)}


def train(folder: Path, resume: bool, recipe: Any = RECIPE) -> dict[str, Any]:
    """A run of 7 steps, or its second half. Every rank starts from other weights, as scripts without a seed do."""
    accelerator = Accelerator(cpu=True, dataloader_config=SEEDED)
    assert accelerator.num_processes == 2
    net = network(seed=accelerator.process_index)
    tost = TostHook(recipe, accelerator, watch=look(folder.parent / "watch") if recipe is RECIPE else None)
    tost.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    step = 0
    if resume:
        accelerator.load_state(str(folder))
        step = tost.session.saved_step()
    tost.start(optimizer, batches, total_steps=STEPS)
    loss_fn, alphas, masks = tost.criterion(F.cross_entropy), [], []
    watch = Watch(counts=recipe is RECIPE and not resume)
    while step < STEPS:
        batches.set_epoch(step // PER_EPOCH)
        left = skip_first_batches(batches, step % PER_EPOCH) if step % PER_EPOCH else batches
        for images, labels in left:
            accelerator.backward(loss_fn(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            watch(net, tost.session.optimizers.inner[0], tost.session)
            alphas.append(tost.session.metrics().get("tost/ghost_skip/alpha"))
            masks.append(dict(tost.session.mask))
            if step == MIDDLE and not resume:
                accelerator.save_state(str(folder))
            if step == STEPS:
                break
    tost.finish()
    kept = {name: param.detach() for name, param in prunable(net).items()}
    return {
        "mask": dict(tost.session.mask),
        "weights": {name: param.detach() for name, param in net.named_parameters()},
        "alphas": alphas,
        "masks": masks,
        "states": watch.states,
        "sent": watch.sent,
        "plain": list(net.state_dict()) == list(network(0).state_dict())
        and not any(value[~tost.session.mask[name]].any() for name, value in kept.items()),
    }


def untouched() -> dict[str, int]:
    """The collectives of the same loop without ToST."""
    accelerator, net, watch = Accelerator(cpu=True, dataloader_config=SEEDED), network(0), Watch(counts=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(net, sgd, loader())
    for images, labels in (batch for _ in range(2) for batch in batches):
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        watch(net, sgd)
    return watch.sent


def first_epoch(folder: Path, scored: bool) -> Tensor:
    """The images that this rank reads first, with or without a mask, an initialisation and a watcher that have looked at them."""
    accelerator, net = Accelerator(cpu=True), network(0)
    tost = TostHook(RECIPE, accelerator, watch=look(folder / "first"))
    tost.attach(net)
    torch.manual_seed(0)
    _, optimizer, batches = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader())
    if scored:
        tost.start(optimizer, batches, total_steps=STEPS)
    return torch.stack([images for images, _ in batches])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {
        "runs": [train(folder / "state", resume=False), train(folder / "state", resume=True)],
        "sent": untouched(),
        **{kind: [train(folder / kind, resume, recipe) for resume in (False, True)] for kind, recipe in MOVING.items()},
        "untouched": first_epoch(folder, scored=False),
        "read": first_epoch(folder, scored=True),
    }
    torch.save(found, folder / f"{Accelerator().process_index}.pt")
    leave()
