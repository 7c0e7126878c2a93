"""What does a mask that moves cost? Training steps of several masks, interleaved, as ratios to a static mask.

    python benchmarks/moving.py --model cifar/resnet20 --pairs 15

Each round takes some steps of every contender in turn; printed are the median ratio over the rounds and its quartiles.
`rigl` and `set` update their masks every 100 steps: each of their rounds has one update in --steps steps, which is more
often than in a real run; the last column scales that down to one in 100.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from interleave import rounds

from tost_plugins import Session, models

MASKS: dict[str, dict[str, Any]] = {
    "static": {"kind": "random", "allocation": "erk"},
    "static again": {"kind": "random", "allocation": "erk"},
    "dnw": {"kind": "dnw"},
    "dnw, frozen": {"kind": "dnw", "freeze": "1ba"},
    "set": {"kind": "set"},
    "rigl": {"kind": "rigl"},
    "gradual, over": {"kind": "gradual", "until": "1ba"},
}


def contender(mask: dict[str, Any], args: argparse.Namespace, stack: ExitStack) -> Callable[[], None]:
    """A function that takes `--steps` training steps with this mask."""
    torch.manual_seed(0)
    model = models.build(args.model, 10, 3).train()
    if mask["kind"] in ("set", "rigl"):
        mask = {**mask, "every": f"{args.steps}ba"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch_size, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch_size,))
    session = Session(model, {"mask": {"sparsity": 0.95, "on_collapse": "keep_one", **mask}})
    stack.enter_context(session.drive(optimizer, total_steps=10**9))

    def steps() -> None:
        for _ in range(args.steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def main() -> None:
    """Time all contenders and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar/resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--steps", type=int, default=5, help="steps of each contender in a round")
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    args = parser.parse_args()
    with ExitStack() as stack:
        running = {name: contender(mask, args, stack) for name, mask in MASKS.items()}
        times = rounds(running, args.pairs)
        stack.pop_all()  # the runs are not finished: leave without a word
    print(
        f"{args.model}, batch {args.batch_size} of {args.size} px, {args.pairs} rounds, {torch.get_num_threads()} threads"
    )
    for name, taken in times.items():
        ratios = [time / static for time, static in zip(taken, times["static"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rare = (
            f"   one update in 100 steps: {1 + (middle - 1) * args.steps / 100:.3f}" if name in ("set", "rigl") else ""
        )
        print(f"{name:15s} {middle:.3f}x of static (quartiles {low:.3f} to {high:.3f}){rare}")


if __name__ == "__main__":
    main()
