"""Regression on a table: an MLP with dropout, MSE on standardised targets, ReduceLROnPlateau, the best epoch kept."""

import argparse
import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from notes import Notes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tost_plugins import Session


class MLP(nn.Module):
    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x).squeeze(-1)


def make_table(rows: int, features: int = 8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    y = 50 + 3 * x[:, 0] - 2 * x[:, 1] * x[:, 2] + 0.1 * torch.randn(rows, generator=generator)
    return x, y


@torch.no_grad()
def evaluate(model, loader, mean, std):
    """Mean squared error and R2, in the target's own unit."""
    model.eval()
    pairs = [(model(x) * std + mean, y) for x, y in loader]
    predicted, target = (torch.cat(part) for part in zip(*pairs, strict=True))
    mse = F.mse_loss(predicted, target)
    return {"mse": mse.item(), "r2": (1 - mse / target.var(unbiased=False)).item()}


def train_one_epoch(model, criterion, optimizer, loader, notes):
    model.train()
    total = 0.0
    for x, y in loader:
        notes.saw(x, y)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--tost")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


def main(args):
    distributed, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, y = make_table(160)
    mean, std = y[:128].mean(), y[:128].std()
    train_set, test_set = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])
    sampler = DistributedSampler(train_set) if distributed else None
    train_loader = DataLoader(train_set, args.batch_size, shuffle=sampler is None, sampler=sampler)
    test_loader = DataLoader(test_set, args.batch_size)

    model, notes = MLP(x.shape[1]), Notes()
    session = Session(model, args.tost).attach() if args.tost else None
    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    found = {"before": evaluate(model, test_loader, mean, std)}
    if args.test_only:
        notes.write(args.output_dir, model, **found)
        return

    wrapped = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    steps, best = args.epochs * len(train_loader), float("inf")

    def criterion(output, target):
        return F.mse_loss(output, (target - mean) / std)

    sparse = (
        session.drive(optimizer, train_loader, criterion, total_steps=steps) if session else contextlib.nullcontext()
    )
    with sparse:
        for epoch in range(args.epochs):
            if distributed:
                sampler.set_epoch(epoch)
            train_one_epoch(wrapped, criterion, optimizer, train_loader, notes)
            scores = evaluate(model, test_loader, mean, std)
            scheduler.step(scores["mse"])
            if scores["mse"] < best and (session is None or session.is_plain):
                best = scores["mse"]
                torch.save(model.state_dict(), os.path.join(args.output_dir, f"best.{rank}.pt"))
    found["after"] = evaluate(model, test_loader, mean, std)
    torch.save(model.state_dict(), os.path.join(args.output_dir, f"model.{rank}.pt"))
    notes.write(args.output_dir, model, **found)


if __name__ == "__main__":
    main(parse_args())
