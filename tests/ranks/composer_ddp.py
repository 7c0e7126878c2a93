"""One of several ranks: trains with TostAlgorithm on its own part of the data, then once more from a checkpoint of the
middle, and writes to FOLDER/<rank>.json where both ended; the same with masks that move."""

import json
import sys
from pathlib import Path

import torch
from composer import Callback, Logger, State, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import FSDP2Config, FSDPConfig, dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from watch import Watch, digest

from tost_plugins import TostError
from tost_plugins.adapters.composer import TostAlgorithm

RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.5, "batches": 2},
    "tweaks": [
        {"kind": "ghost_skip", "until": "3ba"},
        {"kind": "soft_activation", "until": "4ba"},
        {"kind": "rescaled_init", "iterations": 4},
        {"kind": "label_smoothing"},
    ],
}
#: Both move after steps 2 and 4.
MOVING = [
    {"mask": {"kind": "rigl", "sparsity": 0.5, "every": "2ba", "until": "6ba", "drop": 0.5}},
    {"mask": {"kind": "dnw", "sparsity": 0.5}},
]


class Masks(Callback):
    """Notes a digest of the mask, and one of all that is trained, after every batch."""

    def __init__(self, algorithm: TostAlgorithm | None, counts: bool) -> None:
        self.algorithm, self.found, self.watch = algorithm, [], Watch(counts)

    def batch_end(self, state: State, logger: Logger) -> None:
        session = self.algorithm.session if self.algorithm else None
        if session:
            self.found.append(digest(dict(session.mask)))
        self.watch(state.model.module, state.optimizers[0], session)


def model(seed: int = 0) -> ComposerClassifier:
    """A small network; with one seed the same on every rank."""
    torch.manual_seed(seed)
    return ComposerClassifier(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        ),
        num_classes=4,
    )  # fmt: skip


def train(recipe: dict | None = RECIPE, seed: int = 0, **options: object) -> dict[str, object]:
    """Six batches on two ranks; without a recipe, without ToST."""
    net, algorithm, memory = model(seed), TostAlgorithm(recipe) if recipe else None, InMemoryLogger()
    masks = Masks(algorithm, counts=recipe in (None, RECIPE) and "load_path" not in options)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 3, 8, 8, generator=generator), torch.randint(4, (24,), generator=generator))
    loader = DataLoader(data, batch_size=4, sampler=dist.get_sampler(data, shuffle=False))
    trainer = Trainer(
        model=net,
        optimizers=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
        train_dataloader=loader,
        max_duration="2ep",
        algorithms=[algorithm] if algorithm else [],
        loggers=[memory],
        callbacks=[masks],
        progress_bar=False,
        device="cpu",
        seed=3,
        **options,
    )
    assert isinstance(trainer.state.model, DistributedDataParallel)
    trainer.fit()
    if algorithm is None:
        return {"sent": masks.watch.sent}
    # running statistics are each rank's own, and are broadcast before the next forward only
    weights = dict(net.named_parameters())
    return {
        "find_unused_parameters": trainer.state.model.find_unused_parameters,
        "alphas": [float(value) for _, value in memory.data.get("tost/ghost_skip/alpha", [])],
        "sparsity": algorithm.session.mask.sparsity,
        "mask": digest(dict(algorithm.session.mask)),
        "masks": masks.found,
        "states": masks.watch.states,
        "sent": masks.watch.sent,
        "weights": digest(weights),
        "plain": list(net.state_dict()) == list(model().state_dict()),
    }


def both(folder: Path, recipe: dict) -> dict[str, object]:
    """A run with a mask that moves, and its second half from a checkpoint; every rank starts from other weights, as scripts
    without a seed do."""
    folder /= recipe["mask"]["kind"]
    whole = train(
        recipe, dist.get_global_rank(), save_folder=str(folder), save_filename="ba{batch}.pt", save_interval="4ba"
    )
    dist.barrier()
    return {"whole": whole, "resumed": train(recipe, load_path=str(folder / "ba4.pt"))}


def refused() -> list[str]:
    """What a Trainer that is to shard the weights says, with either kind of FSDP."""
    found = []
    for config in (FSDPConfig(), FSDP2Config()):
        try:
            train(parallelism_config={"fsdp": config})
        except TostError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    saved = {"save_filename": "ba{batch}.pt", "save_interval": "4ba"}
    found = train(save_folder=str(folder), **saved)
    dist.barrier()
    found["untouched"] = train(None, save_folder=str(folder / "untouched"), **saved)["sent"]
    found["resumed"] = train(load_path=str(folder / "ba4.pt"))["weights"]
    found["refused"] = refused()
    found["moving"] = [both(folder, recipe) for recipe in MOVING]
    (folder / f"{dist.get_global_rank()}.json").write_text(json.dumps(found))
