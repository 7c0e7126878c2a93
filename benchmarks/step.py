"""What does a static mask cost? Training steps with and without one, interleaved, as ratios to the untouched network.

    python benchmarks/step.py --model torchvision/resnet18 --batch-size 64 --pairs 15

Each round takes some steps of every contender in turn, in a new order each time; printed are the median ratio
over the rounds and its quartiles. `clipped` is the same step with `clip_grad_norm_` in front of it.
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

CONTENDERS = ("untouched", "untouched again", "masked", "clipped", "masked, clipped")
#: name of a ratio -> who is divided by whom
RATIOS = {
    "untouched again / untouched": ("untouched again", "untouched"),
    "masked / untouched": ("masked", "untouched"),
    "masked, clipped / clipped": ("masked, clipped", "clipped"),
}


def contender(name: str, args: argparse.Namespace, stack: ExitStack) -> Callable[[], None]:
    """A function that takes `--steps` training steps."""
    torch.manual_seed(0)
    model = models.build(args.model, 10, 3).train()
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    if args.channels_last:
        model: Any = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.randint(10, (args.batch_size,))
    if "masked" in name:
        session = Session(model, {"mask": {"kind": "random", "sparsity": 0.9, "allocation": "erk"}})
        stack.enter_context(session.drive(optimizer, total_steps=10**9))

    def steps() -> None:
        for _ in range(args.steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if "clipped" in name:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return steps


def main() -> None:
    """Time all contenders and print a line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender in a round")
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    with ExitStack() as stack:
        running = {name: contender(name, args, stack) for name in CONTENDERS}
        times = rounds(running, args.pairs)
        stack.pop_all()  # the runs are not finished: leave without a word
    print(
        f"{args.model}, batch {args.batch_size} of {args.size} px, {args.pairs} rounds, {torch.get_num_threads()} threads, "
        f"{'channels_last' if args.channels_last else 'contiguous'}: {statistics.median(times['untouched']):.3f} s a step"
    )
    for name, (one, other) in RATIOS.items():
        low, middle, high = statistics.quantiles((a / b for a, b in zip(times[one], times[other], strict=True)), n=4)
        print(f"{name:28s} {middle:.3f}x (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
