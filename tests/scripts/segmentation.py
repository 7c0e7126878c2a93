"""Semantic segmentation as in torchvision's references: outputs {"out", "aux"}, void pixels 255, mean IoU, a poly schedule."""

import argparse
import contextlib
import os
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from notes import Notes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from tost_plugins import Session

CLASSES, VOID = 3, 255


class Squares(Dataset):
    """Noise with a brighter square in it; the square's border is void."""

    def __init__(self, count: int, train: bool) -> None:
        self.count, self.train = count, train

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index + (0 if self.train else 1000))
        image, target = torch.randn(3, 16, 16, generator=generator), torch.zeros(16, 16, dtype=torch.long)
        label, top, left = 1 + index % 2, *torch.randint(2, 7, (2,), generator=generator).tolist()
        target[top - 1 : top + 7, left - 1 : left + 7] = VOID
        target[top : top + 6, left : left + 6] = label
        image[label - 1, top : top + 6, left : left + 6] += 2
        if self.train and torch.rand(()) < 0.5:
            image, target = image.flip(-1), target.flip(-1)
        return image, target


def conv_norm_relu(inputs, outputs, stride=1, dilation=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SmallFCN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm_relu(3, width)
        self.body = nn.Sequential(
            conv_norm_relu(width, 2 * width, stride=2), conv_norm_relu(2 * width, 2 * width, dilation=2)
        )
        self.classifier = nn.Sequential(conv_norm_relu(2 * width, width), nn.Dropout(0.1), nn.Conv2d(width, CLASSES, 1))
        self.aux_classifier = nn.Sequential(conv_norm_relu(width, width), nn.Conv2d(width, CLASSES, 1))

    def forward(self, x):
        early = self.stem(x)
        result = OrderedDict()
        result["out"] = F.interpolate(self.classifier(self.body(early)), size=x.shape[-2:], mode="bilinear")
        result["aux"] = self.aux_classifier(early)
        return result


def criterion(outputs, target):
    losses = {name: F.cross_entropy(out, target, ignore_index=VOID) for name, out in outputs.items()}
    return losses["out"] + 0.5 * losses["aux"]


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    confusion, loss = torch.zeros(CLASSES, CLASSES, dtype=torch.long), 0.0
    for image, target in loader:
        outputs = model(image)
        loss += criterion(outputs, target).item() / len(loader)
        guess, counts = outputs["out"].argmax(1), target != VOID
        pairs = CLASSES * target[counts] + guess[counts]
        confusion += torch.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    hits = confusion.diag().double()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)
    return {"loss": loss, "mean_iou": iou.mean().item(), "confusion": confusion.tolist()}


def train_one_epoch(model, criterion, optimizer, scheduler, loader, notes):
    model.train()
    for image, target in loader:
        notes.saw(image, target)
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def main(args):
    distributed, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    train_set, test_set, notes = Squares(48, train=True), Squares(16, train=False), Notes()
    sampler = DistributedSampler(train_set) if distributed else None
    loader = DataLoader(train_set, args.batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True)
    test_loader = DataLoader(test_set, args.batch_size)

    model, loss_fn = SmallFCN(), criterion
    session = Session(model, args.tost).attach() if args.tost else None
    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    found = {"before": evaluate(model, test_loader)}
    if args.test_only:
        notes.write(args.output_dir, model, **found)
        return
    wrapped = DistributedDataParallel(model) if distributed else model
    heads = [*model.classifier.parameters(), *model.aux_classifier.parameters()]
    groups = [{"params": [*model.stem.parameters(), *model.body.parameters()]}, {"params": heads, "lr": 2 * args.lr}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / (steps + 1)) ** 0.9)
    sparse = contextlib.nullcontext()
    if session:
        sparse, loss_fn = session.drive(optimizer, loader, criterion, total_steps=steps), session.criterion(criterion)
    with sparse:
        for epoch in range(args.epochs):
            if distributed:
                sampler.set_epoch(epoch)
            train_one_epoch(wrapped, loss_fn, optimizer, scheduler, loader, notes)
            print(f"epoch {epoch}: {evaluate(model, test_loader)}")
    found["after"] = evaluate(model, test_loader)
    torch.save(model.state_dict(), os.path.join(args.output_dir, f"model.{rank}.pt"))
    notes.write(args.output_dir, model, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    main(parser.parse_args())
