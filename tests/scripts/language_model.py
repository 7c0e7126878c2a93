"""A causal language model: GPT-2 by its config, Accelerate with gradient accumulation, the model's own loss, perplexity."""

import argparse
import math
import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from notes import Notes
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator, get_scheduler

from tost_plugins import TostHook


class Blocks(Dataset):
    """A text of letters that follow each other, cut into blocks; padding is -100."""

    def __init__(self, count: int, length: int, vocabulary: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(vocabulary, (count, 1), generator=generator)
        jumps = torch.randint(1, 3, (count, length), generator=generator)
        self.ids = (starts + jumps.cumsum(1)) % vocabulary

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        labels = ids.clone()
        labels[len(ids) - index % 4 :] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def evaluate(accelerator, model, loader, batch_size):
    model.eval()
    losses = []
    for batch in loader:
        with torch.no_grad():
            loss = model(**batch).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(batch_size)))
    loss = torch.cat(losses).mean().item()
    return {"loss": loss, "perplexity": math.exp(loss)}


def main(args):
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)
    ddp = DistributedDataParallelKwargs(static_graph=args.ddp_static_graph)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True, dataloader_config=seeded, kwargs_handlers=[ddp]
    )  # fmt: skip
    set_seed(args.seed)
    train_loader = DataLoader(Blocks(48, 12, 20, 1), args.batch_size, shuffle=True, collate_fn=default_data_collator)
    eval_loader = DataLoader(Blocks(16, 12, 20, 2), args.batch_size, collate_fn=default_data_collator)
    config = GPT2Config(
        vocab_size=20, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        activation_function="relu",
    )  # fmt: skip
    model, notes = GPT2LMHeadModel(config), Notes()
    if args.tost:
        tost = TostHook(args.tost, accelerator)
        tost.attach(model)
    if args.resume:
        model.load_state_dict(torch.load(args.resume))

    no_decay = ["bias", "ln_"]
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if any(part in name for part in no_decay) == skip],
            "weight_decay": 0.0 if skip else args.weight_decay,
        }
        for skip in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    net = model
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    steps = args.epochs * math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)
    found = {"before": evaluate(accelerator, model, eval_loader, args.batch_size)}
    if args.test_only:
        notes.write(args.output_dir, net, **found)
        return

    def compute_loss(batch):
        return model(**batch).loss

    if args.tost:
        tost.start(optimizer, train_loader, total_steps=steps)
        compute_loss = tost.criterion(compute_loss)
    for epoch in range(args.epochs):
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                notes.saw(batch["input_ids"], batch["labels"])
                accelerator.backward(compute_loss(batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: {evaluate(accelerator, model, eval_loader, args.batch_size)}")
    if args.tost:
        tost.finish()
    found["after"] = evaluate(accelerator, model, eval_loader, args.batch_size)
    torch.save(net.state_dict(), os.path.join(args.output_dir, f"model.{accelerator.process_index}.pt"))
    notes.write(args.output_dir, net, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--ddp_static_graph", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    main(parser.parse_args())
