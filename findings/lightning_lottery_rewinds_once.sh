#!/usr/bin/env bash
# lightning 2.6.6 (torch 2.13.0): ModelPruning(use_lottery_ticket_hypothesis=True), the default, puts weights
# back to their start values after the first pruning only.
# Expected: after each pruning (each epoch) the weights that are left have the values from before training.
# Seen: so after the first; from the second on they stay as trained. The first rewind makes the parameter share
#   its memory with the kept copy of the start values, so training overwrites the copy, and later rewinds copy
#   the trained weights onto themselves.
# Hit: whoever looks for lottery tickets with the callback; on a CPU and wherever copy and parameter are on one
#   device. The runs look fine; they are plain iterative pruning. (Lightning issue 13643 is an older report that
#   nothing is reset, closed.)
# Output seen:
#   lightning 2.6.6, torch 2.13.0
#   furthest weight from its start value after pruning 1, 2, 3: ['0.000', '0.039', '0.078']
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
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))
        self.start = self.net[0].weight.detach().clone()
        self.away = []

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_epoch_start(self):  # the callback has pruned, and rewound, at the end of the epoch before
        if self.current_epoch:
            self.away.append((self.net[0].weight_orig.detach() - self.start).abs().max().item())


x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
net = Net()
pruning = ModelPruning("l1_unstructured", amount=0.2, parameter_names=["weight"])
trainer = lightning.Trainer(
    max_epochs=4, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(net, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16))
print(f"lightning {lightning.__version__}, torch {torch.__version__.split('+')[0]}")
print("furthest weight from its start value after pruning 1, 2, 3:", [f"{away:.3f}" for away in net.away])
assert net.away[0] == 0, "not even the first pruning rewinds: behaviour has changed"
assert min(net.away[1:]) > 0.01, "behaviour has changed"
EOF
