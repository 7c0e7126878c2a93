"""A language model of letters, for the tests of recurrent layers: text that every Python has, an LSTM and a GRU."""

import codecs
import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session

with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
    import this

TEXT = codecs.decode(this.s, "rot13")  # The Zen of Python, by Tim Peters
LETTERS = sorted(set(TEXT))


class Letters(nn.Module):
    """What comes next, letter by letter."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(len(LETTERS), 8)
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.table(x))[0])[0]).flatten(0, 1)


def windows(count: int, length: int = 16, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches of pieces of the text, and their next letters; always the same."""
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    generator = torch.Generator().manual_seed(4)
    starts = torch.randint(len(ids) - length - 1, (count, size), generator=generator)
    pieces = ids[starts[..., None] + torch.arange(length + 1)]
    return [(piece[:, :-1], piece[:, 1:].flatten()) for piece in pieces]


def trained(world: int = 1, rank: int = 0, steps: int = 8) -> dict[str, Any]:
    """This rank's run with its part of each batch: masks after each step, the weights at the end, ASGD's averages of them."""
    net = Letters().double()
    mask = {"kind": "selfish", "sparsity": 0.6, "allocation": "like:snip", "every": "2ba", "until": "8ba", "drop": 0.6}
    session = Session(net, {"mask": mask, "tweaks": []}).attach()
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.5, t0=2)
    batches = [(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in windows(steps)]
    masks = []
    with session.drive(optimizer, batches, F.cross_entropy, total_steps=steps):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            masks.append(dict(session.mask))
    weights = {name: param.detach().clone() for name, param in net.named_parameters()}
    averages = {name: optimizer.state[param]["ax"] for name, param in net.named_parameters()}
    return {"masks": masks, "weights": weights, "averages": averages}
