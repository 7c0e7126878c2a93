"""A language model of letters: text that every Python has, an LSTM that goes on with it, and the perplexity of its guesses."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLUMNS, LENGTH = 32, 50  # of a batch: how many places are read at once, and how far in one step
_RARE = 20  # letters that the training part has less often are one


def paragraphs() -> str:
    """Python's documentation for `help()`, topic by topic; each paragraph once, where topics repeat each other, in one line."""
    found = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    return "\n".join(filter(None, dict.fromkeys(" ".join(part.split()) for part in found)))


@dataclass(frozen=True)
class Text:
    """The three parts of a text as numbers, one for each of `letters`; 0 is a rare one."""

    letters: int
    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def of(cls, text: str) -> Text:
        """The first eight tenths to train on, the next one to choose by, and the last one to test."""
        ends = [len(text) * tenths // 10 for tenths in (0, 8, 9, 10)]
        often = sorted(letter for letter, count in Counter(text[: ends[1]]).items() if count >= _RARE)
        numbers = {letter: number for number, letter in enumerate(often, 1)}
        ids = torch.tensor([numbers.get(letter, 0) for letter in text])
        return cls(len(often) + 1, *(ids[begin:end] for begin, end in itertools.pairwise(ends)))


class Letters(nn.Module):
    """What comes next, letter by letter: two layers of an LSTM between an embedding and a linear layer."""

    def __init__(self, letters: int, hidden: int = 128, size: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(letters, size)
        self.lstm = nn.LSTM(size, hidden, layers)
        self.head = nn.Linear(hidden, letters)

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scores of what follows each letter of (time, columns), a row for each, and the state behind the last ones."""
        out, state = self.lstm(self.table(x), state)
        return self.head(out).flatten(0, 1), state  # type: ignore[return-value]


def pieces(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A part in `COLUMNS` columns, cut into pieces that follow each other, each with its next letters."""
    columns = ids[: len(ids) // COLUMNS * COLUMNS].view(COLUMNS, -1).t().contiguous()
    starts = range(0, len(columns) - 1, LENGTH)
    return [
        (columns[t : t + LENGTH][: len(columns) - 1 - t], columns[t + 1 : t + 1 + LENGTH].flatten()) for t in starts
    ]


def endlessly(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """The pieces over and over, and whether one is the first, where there is no state to go on with."""
    while True:
        yield from ((x, y, place == 0) for place, (x, y) in enumerate(batches))


@torch.no_grad()
def perplexity(net: nn.Module, ids: Tensor) -> float:
    """exp of the mean cross entropy of each letter, given all before it in its column: 1 is certain, `letters` is chance."""
    state, total, count = None, 0.0, 0
    for x, y in pieces(ids):
        scores, state = net(x, state)
        total, count = total + float(F.cross_entropy(scores, y, reduction="sum")), count + len(y)
    return math.exp(total / count)
