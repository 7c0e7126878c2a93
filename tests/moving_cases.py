"""The masks that move, as the tests of them try each: five cases of four kinds, all with several moves in ten steps."""

import torch
from torch import Tensor, nn

#: case -> the recipe's mask. Each has come to its end by step 8, but for DNW without a freeze, which moves to the end.
MOVING = {
    "set": {"kind": "set", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6},
    "rigl": {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6},
    "dnw": {"kind": "dnw", "sparsity": 0.6},
    "dnw_frozen": {"kind": "dnw", "sparsity": 0.6, "freeze": "5ba"},
    "gradual": {"kind": "gradual", "sparsity": 0.8, "initial": 0.2, "begin": "1ba", "until": "8ba", "every": "2ba"},
}
#: case -> after how many steps the mask may be another one than before the last of them.
MOVES = {
    "set": [3, 5, 7],
    "rigl": [3, 5, 7],
    "dnw": list(range(1, 11)),
    "dnw_frozen": [1, 2, 3, 4, 5],
    "gradual": [1, 3, 5, 7, 8],
}
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
