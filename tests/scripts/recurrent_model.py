"""A recurrent language model, letter by letter: an LSTM whose state goes on from piece to piece, SGD with clipping, the learning
rate divided where the loss stands still, perplexity. The text is one that every Python has."""

import argparse
import codecs
import contextlib
import io
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from notes import Notes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session


class RNNModel(nn.Module):
    def __init__(self, letters: int, size: int = 16, hidden: int = 24, layers: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Embedding(letters, size)
        self.rnn = nn.LSTM(size, hidden, layers)
        self.decoder = nn.Linear(hidden, letters)

    def forward(self, x, state=None):
        out, state = self.rnn(self.encoder(x), state)
        return self.decoder(out).flatten(0, 1), state


def corpus():
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13")
    letters = sorted(set(text))
    return torch.tensor([letters.index(letter) for letter in text]), len(letters)


def batchify(ids, columns):
    return ids[: len(ids) // columns * columns].view(columns, -1).t().contiguous()


def pieces(columns, length):
    for start in range(0, len(columns) - 1, length):
        size = min(length, len(columns) - 1 - start)
        yield columns[start : start + size], columns[start + 1 : start + 1 + size].flatten()


@torch.no_grad()
def evaluate(model, columns, length):
    model.eval()
    state, total = None, 0.0
    for x, y in pieces(columns, length):
        out, state = model(x, state)
        total += F.cross_entropy(out, y).item() * len(x)
    return {"loss": total / (len(columns) - 1), "perplexity": math.exp(total / (len(columns) - 1))}


def train_one_epoch(model, optimizer, columns, length, notes):
    model.train()
    state = None
    for x, y in pieces(columns, length):
        notes.saw(x, y)
        if state is not None:
            state = tuple(part.detach() for part in state)
        out, state = model(x, state)
        optimizer.zero_grad()
        F.cross_entropy(out, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--bptt", type=int, default=20)
    parser.add_argument("--lr", type=float, default=4.0)
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
    ids, letters = corpus()
    train, test = batchify(ids[:-160], args.columns), batchify(ids[-160:], 4)
    if distributed:
        train = train.chunk(dist.get_world_size(), 1)[dist.get_rank()]

    model, notes = RNNModel(letters), Notes()
    session = Session(model, args.tost).attach() if args.tost else None
    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    found = {"before": evaluate(model, test, args.bptt)}
    if args.test_only:
        notes.write(args.output_dir, model, **found)
        return

    wrapped = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=args.lr)
    batches = list(pieces(train, args.bptt))
    sparse = contextlib.nullcontext()
    if session:
        sparse = session.drive(
            optimizer, batches, total_steps=args.epochs * len(batches), forward=lambda model, batch: model(batch[0]),
            criterion=lambda outputs, batch: F.cross_entropy(outputs[0], batch[1]),
        )  # fmt: skip
    best = math.inf
    with sparse:
        for _ in range(args.epochs):
            train_one_epoch(wrapped, optimizer, train, args.bptt, notes)
            loss = evaluate(model, test, args.bptt)["loss"]
            if loss > best:
                for group in optimizer.param_groups:
                    group["lr"] /= 4
            best = min(best, loss)
    found["after"] = evaluate(model, test, args.bptt)
    torch.save(model.state_dict(), os.path.join(args.output_dir, f"model.{rank}.pt"))
    notes.write(args.output_dir, model, **found)


if __name__ == "__main__":
    main(parse_args())
