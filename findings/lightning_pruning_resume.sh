#!/usr/bin/env bash
# lightning 2.6.6 (torch 2.13.0): a run with the ModelPruning callback that is resumed from its own
# checkpoint starts with zeros but without masks, and prunes as if for the first time.
# Expected: 3 epochs that halve the weights, a checkpoint, 1 more epoch: 1/16 of them left, as in a run that
#   was not interrupted.
# Seen: 1/2 of them left. The checkpoint holds the weights with pruning made permanent, no mask; the zeros
#   train again, and the callback's "half of what is left" is then half of everything.
# Hit: whoever prunes step by step with Lightning and resumes (a time limit, a lost machine), or evaluates
#   the resumed network as the sparse one. Nothing is said.
# Output seen:
#   lightning 2.6.6, torch 2.13.0
#   weights kept: 4 epochs 0.062; 3 epochs 0.125; 3 epochs, resumed for the 4th 0.500
#   in the checkpoint: ['net.0.bias', 'net.0.weight', 'net.2.bias', 'net.2.weight']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 lightning==2.6.6
cd "$work"
venv/bin/python - <<'EOF'
import logging
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def kept(self):
        weights = [self.net[0].weight, self.net[2].weight]
        return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def fit(epochs, folder, resume=None):
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    net = Net()
    pruning = ModelPruning(
        "l1_unstructured", amount=0.5, parameter_names=["weight"], use_lottery_ticket_hypothesis=False
    )
    saving = ModelCheckpoint(dirpath=folder, save_last=True, save_on_train_epoch_end=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[pruning, saving], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16), ckpt_path=resume)
    return net


whole = fit(4, "whole").kept()
before = fit(3, "parts").kept()
resumed = fit(4, "parts", resume="parts/last.ckpt").kept()
names = sorted(torch.load("parts/last.ckpt", weights_only=False)["state_dict"])
print(f"lightning {lightning.__version__}, torch {torch.__version__.split('+')[0]}")
print(f"weights kept: 4 epochs {whole:.3f}; 3 epochs {before:.3f}; 3 epochs, resumed for the 4th {resumed:.3f}")
print(f"in the checkpoint: {names}")
assert abs(whole - 1 / 16) < 0.01 and abs(before - 1 / 8) < 0.01, "pruning itself has changed"
assert resumed > 0.45 and not any("mask" in name for name in names), "behaviour has changed"
EOF
