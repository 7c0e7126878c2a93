"""A loop as in timm's train.py: create_model, its optimizers, schedules and losses, Mixup, ModelEmaV3, clipping."""

import argparse
import contextlib
import os

import timm
import torch
import torch.distributed as dist
from notes import Notes
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy, dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tost_plugins import Session


def make_images(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator) + target[:, None, None, None] / 2, target)


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args, scheduler, mixup_fn, model_ema, notes):
    model.train()
    updates = epoch * len(loader)
    for input, target in loader:
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        notes.saw(input, target)
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad is not None:
            dispatch_clip_grad(model.parameters(), value=args.clip_grad, mode="norm")
        optimizer.step()
        updates += 1
        model_ema.update(model.module if args.distributed else model, step=updates)
        scheduler.step_update(num_updates=updates)


@torch.no_grad()
def validate(model, loader, loss_fn):
    model.eval()
    logits, targets = zip(*[(model(input), target) for input, target in loader], strict=True)
    logits, target = torch.cat(logits), torch.cat(targets)
    (top1,) = accuracy(logits, target, topk=(1,))
    return {"top1": float(top1), "loss": loss_fn(logits, target).item()}


def main(args):
    args.distributed, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    if args.distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    model, notes = timm.create_model(args.model, pretrained=False, num_classes=3, drop_path_rate=0.1), Notes()
    session = Session(model, args.tost).attach() if args.tost else None
    if args.checkpoint:
        model.load_state_dict(torch.load(args.checkpoint))
    train_set, loader_eval = make_images(48, 3, 1), DataLoader(make_images(16, 3, 2), 8)
    validate_loss_fn = nn.CrossEntropyLoss()
    found = {"before": validate(model, loader_eval, validate_loss_fn)}
    if args.evaluate:
        notes.write(args.output_dir, model, **found)
        return

    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay)
    wrapped = DistributedDataParallel(model) if args.distributed else model
    sampler = DistributedSampler(train_set) if args.distributed else None
    loader = DataLoader(train_set, args.batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True)
    mixup_fn = None
    train_loss_fn = nn.CrossEntropyLoss()
    if args.mixup > 0:
        mixup_fn = Mixup(mixup_alpha=args.mixup, cutmix_alpha=1.0, label_smoothing=args.smoothing, num_classes=3)
        train_loss_fn = SoftTargetCrossEntropy()
    elif args.smoothing:
        train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-3, updates_per_epoch=len(loader),
        step_on_epochs=False,
    )  # fmt: skip
    sparse = contextlib.nullcontext()
    if session:
        sparse = session.drive(optimizer, loader, total_steps=epochs * len(loader))
        train_loss_fn = session.criterion(train_loss_fn)
    with sparse:
        for epoch in range(epochs):
            if args.distributed:
                sampler.set_epoch(epoch)
            train_one_epoch(
                epoch, wrapped, loader, optimizer, train_loss_fn, args, scheduler, mixup_fn, model_ema, notes
            )
            print(f"epoch {epoch}: {validate(model, loader_eval, validate_loss_fn)}")
            print(f"epoch {epoch}, EMA: {validate(model_ema, loader_eval, validate_loss_fn)}")
            scheduler.step(epoch + 1)
    ema = session.plain(model_ema.module) if session else model_ema.module
    found["after"] = validate(model, loader_eval, validate_loss_fn)
    found["ema"] = [validate(model_ema, loader_eval, validate_loss_fn), validate(ema, loader_eval, validate_loss_fn)]
    torch.save(model.state_dict(), os.path.join(args.output_dir, f"model.{rank}.pt"))
    torch.save(ema.state_dict(), os.path.join(args.output_dir, f"ema.{rank}.pt"))
    notes.write(args.output_dir, model, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--model-ema-decay", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-e", "--evaluate", "--test_only", action="store_true")
    parser.add_argument("--checkpoint", "--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output-dir", "--output_dir", required=True)
    main(parser.parse_args())
