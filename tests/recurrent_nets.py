"""A language model of letters, for the tests of recurrent layers: text that every Python has, an LSTM and a GRU."""

import codecs
import contextlib
import io

import torch
from torch import Tensor, nn

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
