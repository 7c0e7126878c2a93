"""This checkout beside an older one: what masks cost in a step, at the start, and in what is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from interleave import Row, Ratio, timed  # isort: skip

TITLE = "This version beside an older one"
ABOUT = """
Each build is a process of its own that takes a step when it is its turn, so that both are measured in the same rounds. "static":
a step with a random mask of sparsity 0.9; "dnw": with DNW at 0.9; "start": `Session.start` with a given mask of sparsity 0.9;
"metrics": `session.metrics()` after a step of DNW, which trainers log. For vgg16_bn, nearly all of whose time goes into its
134 million weights, 1.5 is wanted of DNW. "set-up": all of `Session.start` with the default recipe, before the first of 1,000
steps. Of an older build's 180 iterations of `rescaled_init` three are timed, and counted 60 times; here there are as many as the
run pays for, and all are timed.

Why limits are missed: a static mask passes over memory three times (gradients as they arrive, their check for NaN, weights after
the step); the older build looked at a 64th of each large layer, which left removed weights nonzero under some optimizers. DNW
passes over it a dozen times. Processes of one build differ by some percent among themselves.
"""
OLD = "TOST_OLDER_BUILD"  # the environment variable that names the folder of the older checkout
RATIOS = [
    Ratio("static", "static", "untouched", most=1.02),
    Ratio("static, older", "static, older", "untouched"),
    Ratio("dnw", "dnw", "untouched", most=1.20),
    Ratio("dnw, older", "dnw, older", "untouched"),
    Ratio("start with a static mask / older", "start", "start, older", most=0.5),
    Ratio("set-up of the default recipe / older", "set-up", "set-up, older", most=0.1),
    Ratio("set-up of the default recipe / a training step", "set-up", "untouched"),
    Ratio("set-up of the default recipe, older / a training step", "set-up, older", "untouched"),
    Ratio("metrics under DNW", "metrics", most=0.001),
    Ratio("metrics under DNW, older", "metrics, older"),
]
STEPS = {"resnet18": (128, 32), "vgg16_bn": (32, 32)}


def measure(small: bool) -> Iterator[Row]:
    """The rows of all cases; raises RuntimeError without an older build."""
    if OLD not in os.environ:
        raise RuntimeError(f"set {OLD} to the folder of an older checkout")
    builds = {"": Path(__file__).resolve().parent.parent, ", older": Path(os.environ[OLD]).resolve()}
    count = 3 if small else 15
    for model, (batch, size) in STEPS.items():
        if small and model != "resnet18":
            continue
        shape = (2, size) if small else (batch, size)
        with ExitStack() as stack:
            workers = {
                name + which: stack.enter_context(Worker(folder, name, model, *shape))
                for name in ("static", "dnw")
                for which, folder in builds.items()
            }
            workers["untouched"] = stack.enter_context(Worker(builds[""], "untouched", model, *shape))
            case = f"{model}, {shape[0]} images of {size} px"
            yield from timed(case, workers, count)
            logged = {"metrics" + which: workers["dnw" + which].metrics for which in builds}
            yield from timed(f"{model}, metrics", logged, count)
    with ExitStack() as stack:
        starts = {
            "start" + which: stack.enter_context(Worker(folder, "start", "resnet18" if small else "resnet50", 2, 32))
            for which, folder in builds.items()
        }
        yield from timed("ResNet-50, start", starts, 3 if small else 9)
    yield from set_up(builds, 2 if small else 64)


def set_up(builds: dict[str, Path], batch: int) -> Iterator[Row]:
    """The rows of the set-up: minutes for each round, so there is one."""
    with ExitStack() as stack:
        starts = {
            "set-up" + which: stack.enter_context(Worker(folder, "set-up", "resnet18", batch, 32))
            for which, folder in builds.items()
        }
        starts["untouched"] = stack.enter_context(Worker(builds[""], "untouched", "resnet18", batch, 32))
        for _ in range(5):
            starts["untouched"]()  # the first steps of a process are slow
        yield from timed(f"resnet18, {batch} images of 32 px, set-up", starts, 1, warm_up=0)


class Worker:
    """A process of one build; a call is one turn of what it does, and returns the seconds that it took."""

    def __init__(self, build: Path, *what: Any) -> None:
        command = [sys.executable, __file__, str(build), *map(str, what)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def __call__(self) -> float:
        return self._ask("turn")

    def metrics(self) -> float:
        """What is logged after one more step."""
        return self._ask("metrics")

    def _ask(self, what: str) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def work(build: str, name: str, model: str, batch: str, size: str) -> None:
    """Answer each line of the input with seconds."""
    sys.path.insert(0, build)
    made = {"start": _start, "set-up": _set_up}.get(name, _step)
    turn, metrics = made(name, model, int(batch), int(size))
    for line in sys.stdin:
        if line.strip() == "metrics":
            turn()
            begun = time.perf_counter()
            metrics()
            own: float | None = time.perf_counter() - begun
        else:
            begun = time.perf_counter()
            own = turn()
        print(time.perf_counter() - begun if own is None else own, flush=True)


def _step(name: str, model: str, batch: int, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch
    import torch.nn.functional as F
    import torchvision

    from tost_plugins import Session

    torch.manual_seed(0)
    net = torchvision.models.get_model(model, num_classes=10).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    metrics: Callable[[], Any] = dict
    loop: Any = None
    if name != "untouched":
        kind = {"kind": "random" if name == "static" else "dnw", "sparsity": 0.9, "on_collapse": "keep_one"}
        session = Session(net, {"mask": kind})
        loop = session.drive(optimizer, total_steps=10**9)
        loop.__enter__()
        metrics = session.metrics

    def turn(held: Any = loop) -> None:  # a loop ends when nobody holds it
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return turn, metrics


def _start(name: str, model: str, batch: int, size: int) -> tuple[Callable[[], float], Callable[[], Any]]:
    import torch
    import torchvision

    from tost_plugins import Session, masks

    net = torchvision.models.get_model(model, num_classes=10)
    mask = masks.find(net, "random", 0.9, on_collapse="keep_one")
    weights = {key: value.clone() for key, value in net.state_dict().items()}

    def turn() -> float:
        net.load_state_dict(weights)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        session = Session(net, {"mask": {"kind": "random", "sparsity": 0.9}}, mask).attach()
        begun = time.perf_counter()
        session.start(optimizer, total_steps=10)
        taken = time.perf_counter() - begun
        session.finish()
        return taken

    return turn, dict


def _set_up(name: str, model: str, batch: int, size: int) -> tuple[Callable[[], float], Callable[[], Any]]:
    import inspect

    import torch
    import torchvision

    from tost_plugins import Recipe, Session
    from tost_plugins.tweaks.rescaled_init import rescale

    def turn(iterations: int | None = None, mask: Any = None) -> Any:
        torch.manual_seed(0)
        net = torchvision.models.get_model(model, num_classes=10)
        batches = [(torch.randn(batch, 3, size, size), torch.randint(10, (batch,))) for _ in range(20)]
        recipe = Recipe.of(None).to_dict()
        own = {"iterations": iterations} if iterations else {}
        recipe["tweaks"] = [each | own if each["kind"] == "rescaled_init" else each for each in recipe["tweaks"]]
        session = Session(net, recipe, mask).attach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        begun = time.perf_counter()
        session.start(optimizer, batches, total_steps=1000)
        return time.perf_counter() - begun, session.mask

    def whole() -> float:
        if inspect.signature(rescale).parameters["iterations"].default is None:  # as many as the run pays for
            return turn()[0]
        one, mask = turn(1)
        return one + 179 / 3 * (turn(4, mask)[0] - turn(1, mask)[0])

    return whole, dict


if __name__ == "__main__":
    work(*sys.argv[1:])
