"""A training step in plain PyTorch, beside the same step of the untouched model and of what else masks weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from interleave import Contender, Ratio, Row, timed
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tost_plugins import Session, masks
from tost_plugins.lab import models
from tost_plugins.training.params import prunable

TITLE = "A training step"
ABOUT = """
SGD with momentum on random images; every contender has its own copy of the network and takes one step in each round. "static":
a random mask of sparsity 0.9. "all tweaks": the same with ghost skips and soft activations at work, and label smoothing
(rescaled initialisation is over before the first step); "after the ghosts": the same recipe when its schedules have ended;
"multiplicative": the tweak that the default recipe has beside ToST's.
RigL, SET and selfish move their masks in every step that is timed here; "an update in 100 steps" is that step and 99 of the
static mask. "prune" is `torch.nn.utils.prune` (the weight is made anew in every forward pass), "parametrize" a module that
multiplies weight and mask in `torch.nn.utils.parametrize`, "sparsimony" the package of that name (its SET between two updates;
`make bench` installs version 0.1.0 without its dependencies, since it asks for numpy 1). "untouched again" is what the machine
does by itself.
"""

SPARSITY = 0.9
STATIC = {"kind": "random", "sparsity": SPARSITY, "allocation": "erk", "on_collapse": "keep_one"}


def tweaks(until: str) -> list[dict[str, Any]]:
    """All that act during training, until then."""
    return [{"kind": "ghost_skip", "until": until}, {"kind": "soft_activation", "until": until}, "label_smoothing"]  # type: ignore[list-item]


def moving(kind: str, **options: Any) -> dict[str, Any]:
    """The recipe of a mask that moves."""
    return {"mask": {**STATIC, "kind": kind, **options}}


NEVER = f"{10**9}ba"
RECIPES: dict[str, dict[str, Any]] = {
    "static": {"mask": STATIC},
    "all tweaks": {"mask": STATIC, "tweaks": tweaks("1dur")},
    "after the ghosts": {"mask": STATIC, "tweaks": tweaks("1ba")},
    "multiplicative": {"mask": STATIC, "tweaks": ["multiplicative"]},
    "rigl": moving("rigl", every="1ba"),
    "set": moving("set", every="1ba"),
    "selfish": moving("selfish", every="1ba"),
    "snfs": moving("snfs", every=NEVER),
    "snfs, an update": moving("snfs", every="1ba"),
    "dnw": moving("dnw"),
    "dnw, frozen": moving("dnw", freeze="1ba"),
    "top_kast": moving("top_kast", every=NEVER),
    "top_kast, a ranking": moving("top_kast", every="1ba"),
    "gradual, over": moving("gradual", until="1ba"),
    "ac_dc, a change": moving("ac_dc", begin="1ba", every="1ba"),
    "edge_popup": moving("edge_popup"),
}
LIMITS = {"static": 1.02, "all tweaks": 1.35, "after the ghosts": 1.03, "dnw": 1.20, "top_kast": 1.20}
MOVES = (
    "rigl",
    "set",
    "selfish",
    "snfs, an update",
    "top_kast, a ranking",
    "ac_dc, a change",
)  # shown as one step of 100
RATIOS = [
    Ratio("untouched again", "untouched again", "untouched"),
    *(Ratio(name, name, "untouched", most=LIMITS.get(name)) for name in RECIPES if name not in MOVES),
    Ratio("rigl, an update in 100 steps", "rigl", "untouched", most=1.03, share=0.01, rest="static"),
    Ratio("set, an update in 100 steps", "set", "untouched", share=0.01, rest="static"),
    Ratio("selfish, an update in 100 steps", "selfish", "untouched", share=0.01, rest="static"),
    Ratio("snfs, an update in 100 steps, to static", "snfs, an update", "static", most=1.10, share=0.01, rest="snfs"),
    Ratio(
        "top_kast, a ranking in 100 steps", "top_kast, a ranking", "untouched", most=1.20, share=0.01, rest="top_kast"
    ),
    Ratio("ac_dc, a change in 100 steps, to static", "ac_dc, a change", "static", most=1.10, share=0.01, rest="static"),
    Ratio("static, both clipped", "static, clipped", "clipped", most=1.02),
    *(Ratio(name, name, "untouched") for name in ("prune", "parametrize", "sparsimony")),
]


@dataclass(frozen=True)
class Case:
    """A network and its batch; `more` are contenders beside the usual ones."""

    model: str
    batch: int
    size: int
    more: tuple[str, ...] = ()
    only: tuple[str, ...] = (
        "all tweaks",
        "after the ghosts",
        "multiplicative",
        "rigl",
        "dnw",
        "prune",
        "parametrize",
        "sparsimony",
    )
    channels_last: bool = False

    def __str__(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"{self.model.rpartition('/')[2]}, {self.batch} images of {self.size} px{layout}"


_NEW = ("snfs", "snfs, an update", "top_kast", "top_kast, a ranking", "ac_dc, a change", "edge_popup")
_MORE = ("set", "selfish", "dnw, frozen", "gradual, over", *_NEW, "clipped", "static, clipped")
CASES = [
    Case("torchvision/resnet18", 128, 32, _MORE),
    Case("torchvision/resnet18", 128, 32, only=(), channels_last=True),
    Case("torchvision/mobilenet_v2", 128, 32),
    Case("torchvision/vgg16_bn", 32, 32, only=("all tweaks", "after the ghosts", "rigl", "dnw", "parametrize")),
    Case("torchvision/resnet18", 4, 224),
    Case("torchvision/mobilenet_v2", 4, 224),
    Case("torchvision/vgg16_bn", 2, 224, only=("all tweaks", "after the ghosts")),
]
SMALL = [Case("cifar/resnet8", 8, 16, _MORE)]


def measure(small: bool) -> Iterator[Row]:
    """The rows of all cases."""
    for case in SMALL if small else CASES:
        for turn, names in enumerate(_groups(case)):
            with ExitStack() as stack:
                contenders = {name: contender(name, case, stack) for name in names}
                yield from timed(str(case), contenders, 3 if small else 15, first=100 * turn)
                stack.pop_all()  # the runs are not finished: leave without a word


def _groups(case: Case) -> list[list[str]]:
    """The contenders, as many at once as half of the memory holds; "untouched" is in each group."""
    names = ["untouched again", "static", *case.only, *case.more]
    if importlib.util.find_spec("sparsimony") is None:
        names = [name for name in names if name != "sparsimony"]
    params = sum(param.numel() for param in models.build(case.model, 10).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    together = max(1, int(memory / 2 / (6 * 4 * params)) - 1)  # weight, gradient, momentum and mask, and what else
    return [["untouched", *names[i : i + together]] for i in range(0, len(names), together)]


def contender(name: str, case: Case, stack: ExitStack) -> Contender:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = models.build(case.model, 10).train()
    images, labels = torch.randn(case.batch, 3, case.size, case.size), torch.randint(10, (case.batch,))
    if case.channels_last:
        model: Any = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    base, loss_fn, after = name.removesuffix(", clipped"), F.cross_entropy, lambda: None
    if base in ("prune", "parametrize"):
        _OTHERS[base](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if base == "sparsimony":
        after = _sparsimony(model, optimizer)
    if base in RECIPES:
        session = Session(model, RECIPES[base]).attach()
        loss_fn = session.criterion(loss_fn)
        stack.enter_context(session.drive(optimizer, total_steps=10**9))

    def step() -> None:
        loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if "clipped" in name:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()

    return step


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers that the mask is about, and its part in float32."""
    mask = masks.find(model, "random", SPARSITY, allocation="erk", on_collapse="keep_one")
    modules = dict(model.named_modules())
    for name in prunable(model):
        yield modules[name.rpartition(".")[0]], mask[name].float()


def _pruned(model: nn.Module) -> None:
    for module, mask in _layers(model):
        prune.custom_from_mask(module, "weight", mask)


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _parametrized(model: nn.Module) -> None:
    for module, mask in _layers(model):
        parametrize.register_parametrization(module, "weight", _Masked(mask))


_OTHERS: dict[str, Callable[[nn.Module], None]] = {"prune": _pruned, "parametrize": _parametrized}


def _sparsimony(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    from sparsimony.distributions.base import UniformDistribution
    from sparsimony.dst.set import SET
    from sparsimony.schedulers.base import ConstantScheduler

    layers = [{"tensor_fqn": name} for name in prunable(model)]
    never = ConstantScheduler(0.3, t_end=10**9, delta_t=10**9)
    sparsifier = SET(never, UniformDistribution(), optimizer, SPARSITY, init_method=None)
    sparsifier.prepare(model, layers)
    return sparsifier.step
