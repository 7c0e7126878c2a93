"""The masks that move, as the tests of them try each, all with several moves in ten steps."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Mask, Session

#: case -> the recipe's mask. Each has come to its end by step 8, but for those that move to the end.
MOVING = {
    "set": {"kind": "set", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6},
    "rigl": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6},
    "snfs": {"kind": "snfs", "sparsity": 0.6, "every": "2ba", "until": "8ba"},
    "dnw": {"kind": "dnw", "sparsity": 0.6},
    "dnw_frozen": {"kind": "dnw", "sparsity": 0.6, "freeze": "5ba"},
    "top_kast": {"kind": "top_kast", "sparsity": 0.6, "backward": 0.3, "every": "2ba", "decay": 1e-3},
    "edge_popup": {"kind": "edge_popup", "sparsity": 0.6, "until": "8ba"},
    "gradual": {"kind": "gradual", "sparsity": 0.8, "initial": 0.2, "begin": "1ba", "until": "8ba", "every": "2ba"},
    "ac_dc": {"kind": "ac_dc", "sparsity": 0.6, "begin": "2ba", "every": "1ba", "until": "7ba"},
}
#: case -> after how many steps the mask may be another one than before the last of them.
MOVES = {
    "set": [3, 5, 7],
    "rigl": [3, 5, 7],
    "snfs": [2, 4, 6],
    "dnw": list(range(1, 11)),
    "dnw_frozen": [1, 2, 3, 4, 5],
    "top_kast": [2, 4, 6, 8, 10],
    "edge_popup": list(range(1, 9)),
    "gradual": [1, 3, 5, 7, 8],
    "ac_dc": [2, 3, 4, 5, 7],  # a sparse phase at 6 would leave no dense one before 7
}
COUNTS = ("gradual", "ac_dc")  # of which more or fewer weights are kept as they move
AFTER = (*COUNTS, "snfs")  # which move after a step, and hide nothing
HIDES = ("dnw", "dnw_frozen", "top_kast")  # whose removed weights train, and whose mask need not move when it may
DRAWN = ("set", "rigl", "snfs", "edge_popup")  # whose first mask is random
STEPS = 10


class Digits(nn.Module):
    """A small network for 1x8x8 digits, with or without norms."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
            nn.Flatten(), nn.Linear(72, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def digits(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches for it, always the same."""
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def history(
    case: str,
    net: nn.Module,
    wrap: Callable[[nn.Module], Any] = lambda net: net,
    part: Callable[[Any], Any] = lambda batch: batch,
    parts: int = 1,
    look: Callable[[int, Session], None] = lambda step, session: None,
) -> tuple[list[Mask], dict[str, Tensor]]:
    """The mask after every step, and the weights at the end, of a float64 network that takes `part` of each batch, in
    so many micro-batches; `look` is called before a step."""
    session = Session(net, {"mask": MOVING[case]}).attach()
    model = wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = []
    with session.drive(optimizer, total_steps=STEPS):
        for i, batch in enumerate(digits(STEPS)):
            look(i, session)
            optimizer.zero_grad()
            pieces = list(zip(*(tensor.chunk(parts) for tensor in part(batch)), strict=True))
            for j, (x, y) in enumerate(pieces):
                last = j == parts - 1 or not hasattr(model, "no_sync")
                with contextlib.nullcontext() if last else model.no_sync():
                    (F.cross_entropy(model(x.double()), y) / parts).backward()
            optimizer.step()
            masks.append(session.mask)
    return masks, {name: param.detach().clone() for name, param in net.named_parameters()}
