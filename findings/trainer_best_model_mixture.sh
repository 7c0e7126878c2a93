#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): with a ViT, Trainer's load_best_model_at_end and resume_from_checkpoint
# load a part of the weights and leave the rest as they are.
# Expected: after training the model is the best checkpoint; a resumed one is the checkpoint.
# Seen: the model is a mixture: embeddings, last norm and classifier of the best checkpoint, attention and
#   feed-forward layers of the last step; in a resumed run those layers are the fresh model's random ones. Some
#   models are saved under older names for their layers; from_pretrained translates, Trainer loads the file as
#   it is, with strict=False, and a log line about missing keys is all there is. BERT, whose names are the same
#   in both places, is loaded whole.
# Hit: fine-tuning vision transformers with early stopping or a best metric (the number that is reported belongs
#   to no network that anyone has), and every resumed run of them.
# Known for resuming: https://github.com/huggingface/transformers/issues/43701 and .../issues/48805 (open).
# Output seen:
#   transformers 5.24.0, torch 2.13.0
#   best: checkpoint-2. Of 40 tensors 8 are the best checkpoint's, 32 the last one's
#   of the best: ['classifier.bias', 'classifier.weight', 'vit.embeddings.cls_token', 'vit.embeddings.patch_embe ...
#   resumed from the last: 8 are the checkpoint's, 32 still the fresh model's
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'EOF'
import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
import transformers
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

transformers.utils.logging.disable_progress_bar()


class Data(torch.utils.data.Dataset):
    def __init__(self, flip):
        self.flip = flip

    def __len__(self):
        return 8

    def __getitem__(self, index):
        pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": (index + self.flip) % 2}


def trainer(folder):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=2,
    )
    arguments = TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=8, learning_rate=0.01, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )
    # labels the wrong way round for evaluation, so that its loss grows as training goes on: the first is best
    return Trainer(ViTForImageClassification(config), arguments, train_dataset=Data(0), eval_dataset=Data(1))


def same(state, folder):
    """The names of those tensors that are equal to what from_pretrained reads in a folder."""
    saved = ViTForImageClassification.from_pretrained(folder).state_dict()
    return {name for name in saved if torch.equal(saved[name], state[name])}


run = trainer("run")
run.train()
best, state = run.state.best_model_checkpoint, run.model.state_dict()
as_best, as_last = same(state, best), same(state, "run/checkpoint-6")

again = trainer("run")
fresh = {name: tensor.clone() for name, tensor in again.model.state_dict().items()}
again.args.load_best_model_at_end = False
again.train(resume_from_checkpoint="run/checkpoint-6")  # all steps done: it loads, and ends
resumed = again.model.state_dict()
as_saved = same(resumed, "run/checkpoint-6")
as_fresh = {name for name in fresh if torch.equal(fresh[name], resumed[name])}

print(f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
print(f"best: {os.path.basename(best)}. Of {len(state)} tensors {len(as_best)} are the best checkpoint's, "
      f"{len(as_last)} the last one's")
print(f"of the best: {sorted(as_best)}")
print(f"resumed from the last: {len(as_saved)} are the checkpoint's, {len(as_fresh - as_saved)} still the fresh model's")
assert best.endswith("checkpoint-2"), "the best checkpoint is another one: nothing can be told"
assert 0 < len(as_best) < len(state) and as_best | as_last == set(state), "behaviour has changed"
assert 0 < len(as_saved) < len(state), "behaviour has changed"
EOF
