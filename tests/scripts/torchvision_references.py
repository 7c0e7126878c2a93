"""torchvision's classification reference: mixup and cutmix in the collate function, warm-up, an EMA, checkpoints, --test-only."""

import argparse
import contextlib
import os

import torch
import torch.distributed as dist
import torchvision
from notes import Notes
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2

from tost_plugins import Session


class ExponentialMovingAverage(torch.optim.swa_utils.AveragedModel):
    def __init__(self, model, decay):
        def ema_avg(average, value, num_averaged):
            return decay * average + (1 - decay) * value

        super().__init__(model, avg_fn=ema_avg, use_buffers=True)


def get_model(name, num_classes):
    if name == "small":
        blocks = [[1, 8, 1, 1], [4, 12, 2, 2], [4, 16, 1, 2]]
        return torchvision.models.MobileNetV2(num_classes, width_mult=0.5, inverted_residual_setting=blocks)
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


class Images(Dataset):
    def __init__(self, count, classes, seed, transform):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(classes, (count,), generator=generator)
        self.images = torch.randn(count, 3, 16, 16, generator=generator) + self.targets[:, None, None, None] / 2
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.targets[index]


def train_one_epoch(model, criterion, optimizer, scheduler, data_loader, args, model_ema, notes):
    model.train()
    for i, (image, target) in enumerate(data_loader):
        notes.saw(image, target)
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()
        scheduler.step()
        if i % args.model_ema_steps == 0:
            model_ema.update_parameters(model.module if args.distributed else model)


@torch.inference_mode()
def evaluate(model, criterion, data_loader):
    model.eval()
    correct, loss = 0, 0.0
    for image, target in data_loader:
        output = model(image)
        loss += criterion(output, target).item() * len(target)
        correct += (output.argmax(1) == target).sum().item()
    count = len(data_loader.dataset)
    return {"acc1": 100 * correct / count, "loss": loss / count}


def load_data(args):
    flips = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(p=0.1)])
    train, test = Images(48, 3, 1, flips), Images(16, 3, 2, nn.Identity())
    mix = v2.RandomChoice([v2.MixUp(num_classes=3, alpha=0.2), v2.CutMix(num_classes=3, alpha=1.0)])

    def collate_fn(batch):
        return mix(*default_collate(batch))

    sampler = DistributedSampler(train) if args.distributed else torch.utils.data.RandomSampler(train)
    collate = collate_fn if args.mixup else default_collate
    return DataLoader(train, args.batch_size, sampler=sampler, collate_fn=collate, drop_last=True), DataLoader(test, 8)


def main(args):
    args.distributed, args.rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    if args.distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    data_loader, data_loader_test = load_data(args)
    model, notes = get_model(args.model, num_classes=3), Notes()
    criterion = train_criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    session = Session(model, args.tost).attach() if args.tost else None
    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    found = {"before": evaluate(model, criterion, data_loader_test)}
    if args.test_only:
        notes.write(args.output_dir, model, **found)
        return

    norms = [p for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters(False)]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    groups = [{"params": others, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    steps = args.epochs * len(data_loader)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=args.lr_warmup_steps)
    main_part = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - args.lr_warmup_steps)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, main_part], [args.lr_warmup_steps])
    model_without_ddp = model
    if args.distributed:
        model = nn.parallel.DistributedDataParallel(model)
    model_ema = ExponentialMovingAverage(model_without_ddp, decay=args.model_ema_decay)
    sparse = contextlib.nullcontext()
    if session:
        sparse = session.drive(optimizer, data_loader, criterion, total_steps=steps)
        train_criterion = session.criterion(criterion)
    with sparse:
        for epoch in range(args.epochs):
            if args.distributed:
                data_loader.sampler.set_epoch(epoch)
            train_one_epoch(model, train_criterion, optimizer, scheduler, data_loader, args, model_ema, notes)
            print(f"epoch {epoch}: {evaluate(model, criterion, data_loader_test)}")
            print(f"epoch {epoch}, EMA: {evaluate(model_ema, criterion, data_loader_test)}")
            checkpoint = {
                "model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                "lr_scheduler": scheduler.state_dict(), "model_ema": model_ema.state_dict(), "args": args,
            }  # fmt: skip
            torch.save(checkpoint, os.path.join(args.output_dir, f"checkpoint.{args.rank}.pth"))
    ema = session.plain(model_ema.module) if session else model_ema.module
    found["after"] = evaluate(model_without_ddp, criterion, data_loader_test)
    found["ema"] = [evaluate(model_ema, criterion, data_loader_test), evaluate(ema, criterion, data_loader_test)]
    torch.save(model_without_ddp.state_dict(), os.path.join(args.output_dir, f"model.{args.rank}.pt"))
    torch.save(ema.state_dict(), os.path.join(args.output_dir, f"ema.{args.rank}.pt"))
    notes.write(args.output_dir, model_without_ddp, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="small")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--lr-warmup-steps", type=int, default=2)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--mixup", action="store_true")
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--model-ema-steps", type=int, default=1)
    parser.add_argument("--model-ema-decay", type=float, default=0.7)
    parser.add_argument("--test-only", "--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output-dir", "--output_dir", required=True)
    main(parser.parse_args())
