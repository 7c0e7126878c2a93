#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0 (torch 2.13.0): after trainer.evaluate() or trainer.predict(),
# trainer.train() on several ranks trains a network of its own on each of them.
# Expected: gradients averaged over the ranks and one network, whether or not it was evaluated before.
# Seen: the ranks end with different weights, and nothing is said. Evaluating prepares the network without
#   DistributedDataParallel and marks it as prepared; train() prepares it again, and accelerate hands back as it is
#   what has the mark. Rank 0's network is the one that is saved, and it saw its own part of the data only. Without
#   an evaluation, or with eval_on_start=True, the network is wrapped.
# Hit: whoever measures the starting point (a pretrained or a pruned network's accuracy) with the Trainer that then
#   trains. New in accelerate 1.14.0, by https://github.com/huggingface/accelerate/pull/3977; with 1.13.0 all four
#   of the cases below are wrapped and the ranks agree.
# Output seen:
#   transformers 5.24.0, accelerate 1.15.0, torch 2.13.0
#   2 ranks, 10 steps: what is trained, and the largest difference between the ranks' weights
#   train            DistributedDataParallel  0.0000
#   evaluate, train  Net                      0.3051
#   predict, train   Net                      0.3051
#   eval_on_start    DistributedDataParallel  0.0000
#   warnings logged: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0
cd "$work"
cat > case.py <<'EOF'
import logging

import accelerate
import torch
import transformers
from torch import distributed, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = records.append
for library in ("transformers", "accelerate", "torch"):
    logging.getLogger(library).addHandler(handler)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": (x[0] > 0).long()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def case(before, **settings):
    """What the network is wrapped in, and the largest difference between the two ranks' weights after training."""
    arguments = TrainingArguments(
        "run", max_steps=10, per_device_train_batch_size=4, learning_rate=0.05, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", save_strategy="no", ddp_find_unused_parameters=False, **settings,
    )
    trainer = Trainer(Net(), arguments, train_dataset=Data(), eval_dataset=Data())
    trainer.remove_callback(PrinterCallback)
    assert arguments.world_size == 2
    if before == "evaluate":
        trainer.evaluate()
    elif before == "predict":
        trainer.predict(Data())
    trainer.train()
    weight = trainer.model.layer.weight.detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    distributed.all_gather(both, weight.contiguous())
    return type(trainer.model_wrapped).__name__, (both[0] - both[1]).abs().max().item()


cases = {
    "train": case(None), "evaluate, train": case("evaluate"), "predict, train": case("predict"),
    "eval_on_start": case(None, eval_on_start=True),
}
if distributed.get_rank() == 0:
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, "
          f"torch {torch.__version__.split('+')[0]}")
    print("2 ranks, 10 steps: what is trained, and the largest difference between the ranks' weights")
    for name, (wrapper, difference) in cases.items():
        print(f"{name:16} {wrapper:24} {difference:.4f}")
    print(f"warnings logged: {len(records)}")
for name, (wrapper, difference) in cases.items():
    if name in ("train", "eval_on_start"):
        assert (wrapper, difference) == ("DistributedDataParallel", 0), f"{name} has changed"
    else:
        assert wrapper == "Net" and difference > 0.01, "behaviour has changed"
assert not records, "behaviour has changed: it says something now"
distributed.destroy_process_group()
EOF
OMP_NUM_THREADS=1 venv/bin/torchrun --standalone --nproc-per-node 2 case.py
