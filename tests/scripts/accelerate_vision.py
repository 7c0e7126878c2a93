"""Accelerate's vision example: dict batches, images normalised in the loop, OneCycleLR, a checkpoint each epoch."""

import argparse
import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from notes import Notes
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tost_plugins import TostHook


class PetsDataset(Dataset):
    def __init__(self, count: int, labels: int, seed: int, augment: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(labels, (count,), generator=generator)
        self.images = torch.rand(count, 3, 16, 16, generator=generator) + self.labels[:, None, None, None] / 4
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.augment:
            left, top = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, top : top + 16, left : left + 16]
        return {"image": image, "label": self.labels[index]}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class SmallResNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2, self.fc = Block(8, 12), Block(12, 16), nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def evaluate(accelerator, model, loader, mean, std):
    model.eval()
    accurate, seen, loss = 0, 0, 0.0
    for batch in loader:
        with torch.no_grad():
            outputs = model((batch["image"] - mean) / std)
        outputs, labels = accelerator.gather_for_metrics((outputs, batch["label"]))
        accurate += (outputs.argmax(dim=-1) == labels).sum().item()
        loss += F.cross_entropy(outputs, labels, reduction="sum").item()
        seen += len(labels)
    return {"accuracy": accurate / seen, "loss": loss / seen}


def training_function(args):
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=seeded)
    set_seed(args.seed)
    train_loader = DataLoader(PetsDataset(48, 3, 1, augment=True), args.batch_size, shuffle=True)
    eval_loader = DataLoader(PetsDataset(16, 3, 2, augment=False), args.batch_size)
    mean, std = torch.full((1, 3, 1, 1), 0.6), torch.full((1, 3, 1, 1), 0.4)

    model, loss_fn, notes = SmallResNet(num_classes=3), F.cross_entropy, Notes()
    if args.tost:
        tost = TostHook(args.tost, accelerator)
        tost.attach(model)
    if args.weights:
        model.load_state_dict(torch.load(args.weights))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr / 25)
    steps = args.epochs * len(train_loader) // accelerator.num_processes
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=steps * accelerator.num_processes
    )
    net = model
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    found = {"before": evaluate(accelerator, model, eval_loader, mean, std)}
    if args.test_only:
        notes.write(args.output_dir, net, **found)
        return
    if args.tost:
        tost.start(optimizer, train_loader, total_steps=steps)
        loss_fn = tost.criterion(loss_fn)
    first = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        first = int(os.path.basename(args.resume_from_checkpoint).removeprefix("epoch_")) + 1
    for epoch in range(first, args.epochs):
        model.train()
        train_loader.set_epoch(epoch)
        for batch in train_loader:
            notes.saw(batch["image"], batch["label"])
            outputs = model((batch["image"] - mean) / std)
            loss = loss_fn(outputs, batch["label"])
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: {evaluate(accelerator, model, eval_loader, mean, std)}")
        accelerator.save_state(os.path.join(args.output_dir, f"epoch_{epoch}"))
    if args.tost:
        tost.finish()
    found["after"] = evaluate(accelerator, model, eval_loader, mean, std)
    torch.save(net.state_dict(), os.path.join(args.output_dir, f"model.{accelerator.process_index}.pt"))
    notes.write(args.output_dir, net, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume", dest="weights")
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    training_function(parser.parse_args())
