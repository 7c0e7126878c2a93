"""The field's optimizers under masks, beside training the kept weights alone: docs/optimizers.md.

    .venv/bin/pip install --no-deps pytorch_optimizer schedulefree prodigyopt lion-pytorch heavyball adam-mini
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/optimizers.py [NAME ...]      # about two minutes; without names writes the page

What is not installed is left out and named. "alone" is the same network made from vectors of its kept weights, which never had
the others; "w * mask" has all weights, and multiplies them by the mask in its forward pass.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from optimizer_rows import PACKAGES, ROWS, Made
from torch import Tensor, nn

from tost_plugins import Session, TostError, masks
from tost_plugins.session.optimizer_state import start_values
from tost_plugins.session.steps import leaves
from tost_plugins.session.whole_tensors import late

STEPS, SPARSITY = 100, 0.9
PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"
HEAD = f"""# Optimizers

Written by `python benchmarks/optimizers.py`: a network of two linear layers, {STEPS} steps at each optimizer's own default
settings unless the name says otherwise, a random mask of {SPARSITY:.0%}, in a plain loop.

* zeros: under which masks all removed weights were exactly 0 after every step and all others finite ("all": a random one that
  stands still, RigL, DNW).
* alone: the last training loss divided by that of a network made from vectors of the kept weights, which never had the others;
  "same": every weight is the same to 1e-9 (heavyball and Magma, in float32: 1e-4).
* w * mask: the same beside a network that has all weights and multiplies them by the mask. Above 1 is worse; "-" fails.
* RigL, DNW: the last training loss under these, divided by that of the mask that stands still.
* late: how many times as far as a new weight one goes in its first step that RigL brings back after 500 steps.
* starts: what the optimizer keeps for a new weight, where that is not 0.
* said: what a session says when it starts, in short.

| optimizer | zeros | alone | w * mask | RigL | DNW | late | starts | said |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
**Removed weights that count.** Where "alone" is far from 1 the optimizer looks at whole tensors: "cautious" ones divide by the
share of weights that agree with their gradient, Adafactor and its kin by means of rows, columns and tensors, Muon, SOAP, Shampoo
and GaLore work on the matrix. Nobody can take a removed weight out of those from outside; the session tries the optimizer out on
a small layer of the same sparsity, beside one that holds the kept weights only, and says in one line how far apart they go. Where
it is only the length of the step, the line names the learning rate that makes up for it (measured with timm's cautious AdamW at
90 %: 10 times, at 99.9 %: 450 times, where it gives up dividing).

**Weights that grow late.** When RigL or SET brings a weight back, its state is that of a new one, but an optimizer that corrects
its averages for the first steps (Adam, NAdam) has stopped doing so: such a weight goes 2 to 3 learning rates far under Adam, 14
under NAdam. RMSprop corrects nothing: 10 for any new weight, as in a dense network. Starting the second moment at the square of
the gradient at which the weight grew, scaled to that of the kept ones, or at their mean, makes the first step 0.1 learning rates
at most, and trained worse on digits (a 64-200-200-10 network, 97 and 98.5 %, 1200 steps, 4 seeds): the training loss under RigL
was 0.042, 0.038 and, as it is, 0.025 with Adam, 0.040, 0.035, 0.024 with NAdam, 0.153, 0.146, 0.132 with RMSprop, accuracies
within 0.5 points, mostly in favour of how it is. So it was left; from 5 times a new weight's step on one line says so.

**Steps that a mask takes.** When RigL or SET moves its mask, the optimizer's `step` is not called at all (a few optimizers do not
survive a step without gradients). ZeroRedundancyOptimizer trains as the optimizer that it shares out does
(`tests/session/test_zero_redundancy.py`); it has to be made after attach. Schedule-free optimizers evaluate the sparse network
too: `train` and `eval` are seen, and under DNW what waits out of sight is exchanged with the rest.
"""


def network() -> nn.Sequential:
    """Two linear layers without biases, the same each time; in float64, unless that is switched off."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same ones each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(
            32,
            16,
            generator=generator,
        )
        yield x, (x[:, :4] ** 2).argmax(1)


# ---- one training, three ways


def fit(optimizer: Any, loss_of: Callable[[Tensor, Tensor], Tensor], look: Callable[[], None] = lambda: None) -> float:
    """Train; the mean loss of the last 20 batches with what the optimizer would have evaluated."""
    second = type(optimizer).__name__.lower() in ("adahessian", "sophiah")
    by_closure = type(optimizer).__name__ in ("LBFGS", "SAM")
    for x, y in batches():
        getattr(optimizer, "train", lambda: None)()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward(create_graph=second)
            return loss

        closure()
        optimizer.step(closure) if by_closure else optimizer.step()
        look()
    getattr(optimizer, "eval", lambda: None)()
    look()
    with torch.no_grad():
        return sum(float(loss_of(x, y)) for x, y in list(batches())[-20:]) / 20


def masked(make: Made, mask: dict[str, Any], given: masks.Mask | None) -> tuple[nn.Module, float, bool]:
    """Under a session: the network, its last loss, and whether all removed weights were 0 and all weights finite throughout."""
    net, clean = network(), []
    optimizer = make(net.parameters())
    session = Session(net, {"mask": mask}, given)

    def look() -> None:
        weights = {name: net.get_parameter(name).detach() for name in session.mask}
        clean.append(all(not w[~session.mask[n]].any() and bool(w.isfinite().all()) for n, w in weights.items()))

    with session.drive(optimizer, total_steps=STEPS):
        loss = fit(optimizer, lambda x, y: F.cross_entropy(net(x), y), look)
        assert session.clock.step == STEPS, session.clock
    return net, loss, all(clean)


def alone(make: Made, mask: masks.Mask) -> tuple[dict[str, Tensor], float]:
    """A network that never had the removed weights: only a vector of the kept ones trains, laid out as they are."""
    net = network()
    rows = {name: nn.Parameter(net.get_parameter(name).detach()[keep]) for name, keep in mask.items()}

    def weights() -> dict[str, Tensor]:
        return {n: torch.zeros(k.shape).masked_scatter(k, rows[n]) for n, k in mask.items()}

    loss = fit(
        make(list(rows.values())), lambda x, y: F.cross_entropy(torch.func.functional_call(net, weights(), x), y)
    )
    return {name: weight.detach() for name, weight in weights().items()}, loss


def multiplied(make: Made, mask: masks.Mask) -> float:
    """The last loss of a network that has all weights and multiplies them by the mask."""
    net = network()
    own = dict(net.named_parameters())

    def weights() -> dict[str, Tensor]:
        return {name: param * mask[name] for name, param in own.items()}

    return fit(make(list(own.values())), lambda x, y: F.cross_entropy(torch.func.functional_call(net, weights(), x), y))


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives; the text of its error."""
    try:
        return call()
    except Exception as error:
        return f"refused: {error}" if isinstance(error, TostError) else f"{type(error).__name__}: {error}"


class Said(logging.Handler):
    """The lines about optimizers, shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not text.startswith("recipe "):
            self.lines.append(text.split(": ", 1)[1])


def short(lines: list[str]) -> str:
    text = "; ".join(dict.fromkeys(lines))
    for long, brief in (
        ("removed weights count in its steps: with 90.0% of them the kept ones go ", ""),
        (" as they would alone", ""),
        ("; a learning rate that is right for a dense network may not be", ""),
        ("weights that grow late go ", "late ones "),
        (" in their first step as new ones", ""),
        (
            " holds for a single weight cannot be told and is left as it is; weights that come back start with what it remembers",
            " left",
        ),
    ):
        text = text.replace(long, brief)
    return text or "nothing"


def row(package: str, name: str, make: Made) -> str:
    """The optimizer's line of the table."""
    said = Said()
    logging.getLogger("tost_plugins").addHandler(said)
    mask = masks.find(network(), "random", SPARSITY)
    tries = {
        "static": ({"kind": "random", "sparsity": SPARSITY}, mask),
        "RigL": ({"kind": "rigl", "sparsity": SPARSITY, "every": "10ba"}, None),
        "DNW": ({"kind": "dnw", "sparsity": SPARSITY}, None),
    }
    got = {kind: attempt(lambda one=one: masked(make, *one)) for kind, one in tries.items()}
    logging.getLogger("tost_plugins").removeHandler(said)
    right = [kind for kind, one in got.items() if not isinstance(one, str) and one[2]]
    wrong = "; ".join(f"{kind} {one[:150]}" for kind, one in got.items() if isinstance(one, str))
    loss = got["static"][1] if not isinstance(got["static"], str) else float("nan")
    single, product = attempt(lambda: alone(make, mask)), attempt(lambda: multiplied(make, mask))
    cells = ["-", "-" if isinstance(product, str) else f"{loss / product:.2f}"]
    if not isinstance(single, str):
        net, gap = got["static"][0], 0.0
        if not isinstance(got["static"], str):
            gap = max(
                float((net.get_parameter(n).detach() - w).abs().max() / w.abs().max()) for n, w in single[0].items()
            )
        cells[0] = (
            "same"
            if gap < (1e-9 if torch.get_default_dtype() == torch.float64 else 1e-4)
            else f"{loss / single[1]:.2f}"
        )
    cells += ["-" if isinstance(got[k], str) else f"{got[k][1] / loss:.2f}" for k in ("RigL", "DNW")]
    weight = nn.Parameter(torch.ones(8, 6))
    inner = attempt(lambda: leaves(make([weight]))[0])
    far = attempt(lambda: late(inner, weight, 500))
    starts = {} if isinstance(inner, str) else start_values(inner, weight)
    kept = ", ".join(f"`{key}` {value:.3g}" for key, value in starts.items() if value) or "0"
    zeros = "all" if len(right) == len(tries) else (", ".join(right) or "none") + (f" ({wrong})" if wrong else "")
    title = name if package == "torch" else f"{package}: {name}"
    cells += ["-" if isinstance(far, str) else f"{far:.2g}", kept, short(said.lines)]
    return f"| {title} | {zeros} | {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("tost_plugins").addHandler(logging.NullHandler())
    logging.getLogger("tost_plugins").setLevel(logging.INFO)
    rows, missing, versions = [], [], []
    for package, makers in ROWS.items():
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
            continue
        versions.append(f"{PACKAGES[package]} {version(PACKAGES[package])}")
        for name, make in makers.items():
            if not names or name in names:
                torch.set_default_dtype(
                    torch.float32 if package == "heavyball" or "Magma" in name else torch.float64
                )  # they take no other
                rows.append(row(package, name, make))
                print(rows[-1], flush=True)
    if missing:
        print("left out, not installed:", *missing)
    elif not names:
        PAGE.write_text(HEAD + "\n".join(rows) + f"\n\nWith {', '.join(versions)}.\n" + TAIL)


if __name__ == "__main__":
    main(sys.argv[1:])
