"""Ghost skip connections: a shortcut around every spatial convolution that fades out and is then taken away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training import ranks
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.params import plain_modules, some
from tost_plugins.training.schedules import SCHEDULES
from tost_plugins.training.sharding import is_part
from tost_plugins.training.task import Task
from tost_plugins.tweaks.base import STRICT, Tweak
from tost_plugins.tweaks.strength import Strength, quiet
from tost_plugins.tweaks.surgery.alive import alive_channels
from tost_plugins.tweaks.surgery.place import in_training, matching
from tost_plugins.tweaks.surgery.swap import mixins_of, restore, swap
from tost_plugins.tweaks.surgery.trace import pairs, trace

_LAYERS = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}
#: How many calls of a convolution may be under way before their norm is called; more are calls without a norm.
_STREAMS = 16


class Holder:
    """Hands a convolution's inputs over to the norm behind it, each call's by itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []  # (output, input), of calls whose norm is still to come

    def __reduce__(self) -> tuple:
        return Holder, ()  # a copy is empty: after a forward that broke off, tensors are part of a graph

    def give(self, x: Tensor, out: Tensor) -> None:
        """Keep the input of a call that made `out`; of many calls without a norm the oldest goes."""
        self.calls = [*self.calls[1 - _STREAMS :], (out, x)]

    def take(self, out: Tensor) -> Tensor | None:
        """The input that `out` was made from; a hook may have put another tensor in the place of a single output."""
        found = [i for i, (made, _) in enumerate(self.calls) if made is out] or ([0] if len(self.calls) == 1 else [])
        x = self.calls[found[0]][1] if found else None
        self.calls = self.calls[found[0] + 1 :] if found else []
        return x


class Ghost(nn.Module):
    """`out + alpha * BN(conv1x1(x))`, stride and groups as in the convolution beside it, in the channels that are `alive`.

    Silent until `GhostSkip.advance` wakes it, and whenever a state dict without alpha, a plain network's, is loaded; then,
    and when alpha has come down to 0, no convolution runs, but the parameters stay.
    """

    tost_ghost = True  # not a part of the network that masks and reports are about
    alpha: Tensor
    alive: Tensor

    def __init__(self, beside: Any) -> None:
        super().__init__()
        weight: Tensor = beside.weight
        conv, norm = _LAYERS[weight.ndim - 2]
        # made on the CPU in float32: the same initial values on every device, and no other generator is touched
        where: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.conv = conv(beside.in_channels, beside.out_channels, 1, beside.stride, groups=beside.groups, bias=False,
                         **where)  # fmt: skip
        self.norm = norm(beside.out_channels, **where)
        self.register_buffer("alpha", torch.zeros((), **where))
        self.register_buffer("alive", torch.ones(beside.out_channels, *[1] * (weight.ndim - 2), **where))
        self.holder, self.tost_strength = Holder(), Strength(0.0)
        self.channels: Any = None  # the output channels that its layer computes (places, as a tensor); None for all
        self.to(weight.device, weight.dtype).train(beside.training)

    def forward(self, x: Tensor | None, out: Tensor) -> Tensor:
        """`out` with the branch of `x` on it, or `out` as it is while the ghost is silent."""
        if self.tost_strength.heard and x is not None:
            branch = self.norm(self.conv(_aligned(x, out, self.conv.stride)))
            alpha = self.tost_strength.now(self.alpha)
            alive = self.alive if self.channels is None else self.alive.index_select(0, self.channels.to(out.device))
            return torch.addcmul(out, branch.to(out.dtype), (alpha * alive).to(out.dtype))
        if not self.tost_strength.quiet and ranks.world() > 1 and torch.is_grad_enabled():
            # DDP waits for a gradient of every parameter, in every step: give it zeros
            params = [param for param in self.parameters() if not is_part(param)]  # parts that FSDP2 has not gathered
            return out + (torch.stack([param.sum() for param in params]).sum() * 0).to(out.dtype) if params else out
        return out

    def set_strength(self, strength: float) -> None:
        """Set alpha, of all ghosts of the model; at 0 the branch is silent."""
        self.tost_strength.value, self.tost_strength.live = strength, strength != 0
        self.alpha.fill_(strength)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}alpha", torch.zeros_like(self.alpha))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        alpha = float(self.alpha)
        self.tost_strength.loaded(self, alpha, alpha != 0)


class Tap:
    """Mixin for a convolution whose norm adds the ghost."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution, which leaves its input in the holder."""
        if getattr(self, "_is_replica", False):
            raise TostError(
                "ghost_skip: expected one model per process, got nn.DataParallel, whose threads would mix up the inputs; "
                "start with torchrun (DistributedDataParallel), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        self.tost_holder.give(_input(args, kwargs), out)  # type: ignore[attr-defined]
        return out


class AfterNorm:
    """Mixin for the norm behind a tapped convolution."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm, then the ghost of the convolution's input."""
        ghost: Ghost = self.ghost_skip  # type: ignore[attr-defined]
        source = ghost.holder.take(_input(args, kwargs))
        return ghost(source, super().forward(*args, **kwargs))  # type: ignore[misc]


class AroundConv:
    """Mixin for a convolution with no norm behind it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution, with the ghost of its input."""
        return self.ghost_skip(_input(args, kwargs), super().forward(*args, **kwargs))  # type: ignore[misc]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GhostSkip(Tweak):
    """Temporary skip connections around every convolution with a kernel above 1, the stem excepted.

    Adds `alpha * BN(conv1x1(input))` behind the norm that follows the convolution (behind the convolution itself where
    none does). `alpha` is 1 at the start and 0 from `until` on; then the branch costs nothing, and `detach` removes it.
    A channel that is constant in the sparse network gets no ghost: see `alive_channels`.

    Fields: `until`, when alpha reaches 0; `schedule`, its curve (a name from `tost_plugins.training.schedules.SCHEDULES`);
    `layers`, globs of the convolutions that get a ghost.

    Paper: "Training Your Sparse Neural Network Better with Any Mask" (Jaiswal et al., ICML 2022), section 3.
    Differs from the paper: the text gives no schedule; ours is in docs/schedules.md with what was measured. Dead
    channels are left out.

    Example:
        >>> GhostSkip(until="0.3dur").until.steps(Clock(total_steps=100))
        30
    """

    kind: Literal["ghost_skip"] = "ghost_skip"
    until: TimeField = Time(0.1, "dur")
    schedule: Literal["constant", "linear", "cosine", "cubic"] = "linear"
    layers: tuple[str, ...] = Field(("*",), min_length=1)

    def attach(self, model: nn.Module, seed: int, ignore: Sequence[str] = ()) -> None:
        if Strength.of(_walk(model)) is not None:
            return  # a copy of an attached model brings its ghosts along
        modules = dict(plain_modules(model))
        found = trace(model)
        norms = pairs(model, found)
        stem = found.order[0] if found and found.order else next(iter(norms), None)
        spatial = [path for path in norms if path != stem and max(modules[path].kernel_size) > 1]  # type: ignore
        if not spatial:
            raise Inapplicable(
                f"ghost_skip: expected a convolution with a kernel above 1 besides the stem, got none in "
                f"{type(model).__name__}; leave ghost_skip out, or mark it `optional: true`"
            )
        chosen = matching(spatial, self.layers, "ghost_skip", "a spatial convolution")
        chosen = in_training(model, chosen, ignore, found, "ghost_skip")
        taken: set[nn.Module] = set()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs' generators too
            for path in chosen:
                norm = norms[path]
                _add(modules[path], None if norm is None else modules[norm], taken)
        Strength.of(_walk(model))

    def check(self, model: nn.Module) -> None:
        owners = {path: module for path, module in model.named_modules() if hasattr(module, "ghost_skip")}
        lost = [path for path, module in owners.items() if not {AfterNorm, AroundConv} & set(mixins_of(module))]
        if lost:
            raise TostError(
                f"ghost_skip: expected the modules that were there at attach, got new ones at {some(lost)}, which never "
                f"call their ghosts; convert_sync_batchnorm and the like come before attach"
            )

    def start(self, task: Task, mask: Mapping[str, Tensor]) -> None:
        owners = {id(module.ghost_skip): module for module in task.model.modules() if hasattr(module, "ghost_skip")}
        places = beside(task.model)
        alive = alive_channels(task, mask, [(conv, owners[id(ghost)]) for ghost, conv in places])
        for (ghost, _), found in zip(places, alive, strict=True):
            ghost.alive.copy_(found.view(ghost.alive.shape))

    def advance(self, model: nn.Module, clock: Clock) -> None:
        alpha = SCHEDULES[self.schedule](1.0, 0.0)(clock.progress(self.until))
        strength = Strength.of(_walk(model))  # of the first: a walk through all modules in every step is not free
        if strength is not None and strength.follow(clock.step, alpha, alpha != 0):
            for ghost in ghosts(model):
                ghost.alpha.fill_(alpha)

    def detach(self, model: nn.Module) -> None:
        for module in model.modules():
            if Tap in mixins_of(module):
                restore(module, Tap)
                del module.tost_holder
        for module in list(model.modules()):
            if isinstance(ghost := getattr(module, "ghost_skip", None), Ghost):
                ghost.tost_strength.end(ghost)
                restore(module, AfterNorm)
                restore(module, AroundConv)
                del module.ghost_skip

    @contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        with quiet(Strength.of(_walk(model))):
            yield

    def companions(self, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(param, _weight(conv)) for ghost, conv in beside(model) for param in ghost.parameters()]

    def metrics(self, model: nn.Module) -> dict[str, float]:
        return {
            "tost/ghost_skip/alpha": next((g.tost_strength.value * g.tost_strength.live for g in _walk(model)), 0.0)
        }


def beside(model: nn.Module) -> list[tuple[Ghost, Any]]:
    """Each ghost in a model and the convolution that it stands beside."""
    convs = {id(m.tost_holder): m for m in model.modules() if Tap in mixins_of(m)}
    around = {id(m.ghost_skip): m for m in model.modules() if AroundConv in mixins_of(m)}
    return [(ghost, around.get(id(ghost)) or convs[id(ghost.holder)]) for ghost in ghosts(model)]


def ghosts(model: nn.Module) -> list[Ghost]:
    """The ghosts in a model, in the order of its modules."""
    return list(_walk(model))


def _walk(model: nn.Module) -> Iterator[Ghost]:
    return (module for module in model.modules() if isinstance(module, Ghost))


def _add(conv: Any, norm: Any, taken: set[nn.Module]) -> None:
    if isinstance(getattr(norm, "drop", None), nn.Module) and hasattr(norm, "act"):
        norm = norm.drop  # timm fuses norm and activation: the ghost belongs between them, and `drop` runs there
    if norm is None or norm in taken:
        conv.ghost_skip = Ghost(conv)
        swap(conv, AroundConv)
        return
    taken.add(norm)
    norm.ghost_skip = Ghost(conv)
    conv.tost_holder = norm.ghost_skip.holder
    swap(conv, Tap)
    swap(norm, AfterNorm)


def _weight(conv: nn.Module) -> nn.Parameter:
    """The convolution's weight, or the largest of the parameters that a parametrisation makes it from."""
    own = (param for _, module in plain_modules(conv) for param in module.parameters(recurse=False))
    return conv.weight if "weight" in conv._parameters else max(own, key=torch.numel)  # type: ignore[return-value]


def _aligned(x: Tensor, out: Tensor, stride: tuple[int, ...]) -> Tensor:
    """x, cropped or padded evenly at its borders if a 1x1 convolution of that stride would miss the size of `out`."""
    pad: list[int] = []
    for have, want, step in zip(x.shape[2:], out.shape[2:], stride, strict=True):
        missing = (want - 1) * step + 1 - have
        missing = 0 if -step < missing <= 0 else missing
        before = missing // 2 if missing > 0 else -(-missing // 2)
        pad = [before, missing - before, *pad]
    return F.pad(x, pad) if any(pad) else x
