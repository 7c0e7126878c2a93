"""Ghost soft activations: ReLU becomes a smooth curve that sharpens back into ReLU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.functions import IN_PLACE, RELUS, Instead
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import device_of, plain_modules
from tost_plugins.training.schedules import SCHEDULES
from tost_plugins.tweaks.base import STRICT, Tweak
from tost_plugins.tweaks.strength import Strength, quiet
from tost_plugins.tweaks.surgery.mentions import relu_callers
from tost_plugins.tweaks.surgery.place import in_training, matching
from tost_plugins.tweaks.surgery.swap import mixins_of, original_class, restore, swap
from tost_plugins.tweaks.surgery.trace import trace

#: The beta of a checkpoint from after the end: as good as ReLU, and within the range of half precision.
RELU = 1e4

Shape = Literal["pswish", "swish", "mish"]


def soft(
    x: Tensor, beta: Tensor | float, shape: Shape = "pswish", cap: float | None = None, inplace: bool = False
) -> Tensor:
    """The smooth stand-in for ReLU (for ReLU6 with `cap=6`), of the shape and dtype of x; in x itself with `inplace`.

    pswish is x * sigmoid(beta * x): x / 2 at beta 0, swish at 1, ReLU as beta grows; swish and mish ignore beta.

    Example:
        >>> soft(torch.tensor([-1.0, 0.0, 1.0]), 100.0)
        tensor([-0., 0., 1.])
    """
    if inplace:
        # autograd keeps x as it is now, unless the curve begins with a product of its own
        kept = shape != "pswish" or x.dtype == torch.float16
        return x.copy_(soft(x.clone() if kept else x, beta, shape, cap))
    y = F.mish(x) if shape == "mish" else F.silu(x) if shape == "swish" else _pswish(x, beta)
    return y if cap is None else y.clamp(max=cap)


def _pswish(x: Tensor, beta: Tensor | float) -> Tensor:
    if x.dtype == torch.float16:  # whose range beta * x may leave
        return x * torch.sigmoid(beta * x)
    beta = beta.clamp(min=1e-20) if isinstance(beta, Tensor) else max(beta, 1e-20)  # not 0, where the limit is the same
    return F.silu(beta * x).div_(beta)  # two thirds of the time, backward pass included


class _Soft:
    """What the mixins share: `tost_strength` says how soft, `tost_beta` says it to checkpoints."""

    def _soft(self: Any, x: Tensor, cap: float | None, inplace: bool) -> Tensor:
        return soft(x, self.tost_strength.now(self.tost_beta), self.tost_shape, cap, inplace)

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}tost_beta", torch.full_like(self.tost_beta, RELU))  # as in a plain network
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]
        beta = float(self.tost_beta)
        self.tost_strength.loaded(self, beta, beta < 0.9 * RELU)


class SoftReLU(_Soft):
    """Mixin for nn.ReLU and nn.ReLU6."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The soft curve at the beta of now, or ReLU itself."""
        if self.tost_strength.heard:
            return self._soft(x, 6.0 if isinstance(self, nn.ReLU6) else None, self.inplace)
        return super().forward(x)  # type: ignore[misc]


class SoftRoot(_Soft):
    """Mixin for a network, or a part of one, that calls relu as a function somewhere in its forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The network, with a soft curve for each relu that its own code calls."""
        if not self.tost_strength.heard:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with Instead({relu: functools.partial(_stand_in, self, relu) for relu in RELUS}):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Spared:
    """Mixin for a part within a SoftRoot whose relus stay what they are: nobody trains it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The module, whose calls of relu stay what they are."""
        with Instead(_UNSEEN):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _stand_in(part: Any, relu: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The soft activation in the place of a call of relu."""
    if not torch.compiler.is_compiling() and _in_checkpointed_function():
        part.tost_strength.say_once(
            "soft_activation: relu in a function under torch.utils.checkpoint stays relu, since it runs again after the "
            "network; checkpoint a module instead"
        )
        return relu(*args, **kwargs)
    x = args[0] if args else kwargs["input"]
    return part._soft(x, RELUS[relu], relu in IN_PLACE or _inplace(*args, **kwargs))


def _inplace(input: Any, inplace: bool = False) -> bool:
    """What a call of F.relu says."""
    return inplace


def _in_checkpointed_function() -> bool:
    """Whether torch.utils.checkpoint stands between here and the module: then the function runs again without it."""
    from torch.utils.checkpoint import checkpoint  # brings sympy, a fifth of what torch itself takes to import

    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not SoftRoot.forward.__code__:
        if frame.f_code.co_filename == checkpoint.__code__.co_filename:
            return True
        frame = frame.f_back
    return False


def _unseen(input: Tensor, inplace: bool = False) -> Tensor:
    aten: Any = torch.ops.aten
    return aten.relu_(input) if inplace else aten.relu(input)


def _unseen6(input: Tensor, inplace: bool = False) -> Tensor:
    return F.hardtanh(input, 0.0, 6.0, inplace)


#: The same functions by names that no other table has.
_UNSEEN = {
    relu: _unseen6 if cap else functools.partial(_unseen, inplace=True) if relu in IN_PLACE else _unseen
    for relu, cap in RELUS.items()
}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SoftActivation(Tweak):
    """ReLU -> x * sigmoid(beta * x) with beta rising from `beta[0]` to `beta[1]`; from `until` on ReLU itself again.

    Acts on nn.ReLU, nn.ReLU6 (which keeps its cap) and on F.relu, torch.relu, Tensor.relu and F.relu6 in the
    network's own forward; in place where they are. `shape: swish` or `mish` is the same curve until the end, then ReLU.

    Fields: `until`, when the activation is exactly ReLU again; `shape`, the curve until then, that of beta or one that
    stays; `beta`, its ends (0 is x / 2, 1 is swish, above 10 is
    close to ReLU); `schedule`, how beta rises; `layers`, globs of the modules that it acts on: ReLUs, and those that call
    relu as a function.

    Paper: "Training Your Sparse Neural Network Better with Any Mask" (Jaiswal et al., ICML 2022), section 3.
    Differs from the paper: the text gives no schedule for beta; ours is in docs/schedules.md with what was measured.

    Example:
        >>> SoftActivation(until="60ep", beta=(1, 10)).beta
        (1.0, 10.0)
    """

    kind: Literal["soft_activation"] = "soft_activation"
    until: TimeField = Time(0.1, "dur")
    shape: Shape = "pswish"
    beta: tuple[Annotated[float, Field(gt=0), NUMBER], Annotated[float, Field(gt=0), NUMBER]] = (1.0, 100.0)
    schedule: Literal["constant", "linear", "cosine", "geometric"] = "geometric"
    layers: tuple[str, ...] = Field(("*",), min_length=1)

    def attach(self, model: nn.Module, seed: int, ignore: Sequence[str] = ()) -> None:
        if Strength.of(_walk(model)) is not None:
            return  # a copy of an attached model brings its soft activations along
        modules, found = dict(plain_modules(model)), trace(model)
        relus = [path for path, module in modules.items() if _is_relu(module)]
        callers = relu_callers(model) if found is None else found.relu_callers
        if not relus and not callers:
            raise Inapplicable(
                f"soft_activation: expected nn.ReLU, nn.ReLU6 or F.relu, got none in "
                f"{type(model).__name__}; leave soft_activation out, or mark it `optional: true`"
            )
        chosen = matching([*relus, *callers], self.layers, "soft_activation", "a ReLU or a module that calls relu")
        chosen = in_training(model, chosen, ignore, found, "soft_activation")
        device, strength = device_of(model), Strength(RELU)
        for path in chosen:
            self._soften(modules[path], SoftReLU if path in relus else SoftRoot, device, strength)
        if any(path in callers for path in chosen):
            # the root beside the callers: functions of nobody's are called in it; callers, since gradient checkpointing
            # runs a block again when the root's forward is over
            if "" not in chosen:
                self._soften(model, SoftRoot, device, strength)
            for path in {*relus, *callers} - {*chosen, ""}:
                swap(modules[path], Spared)
        Strength.of(_walk(model))

    def _soften(self, module: nn.Module, mixin: type, device: torch.device, strength: Strength) -> None:
        module.register_buffer("tost_beta", torch.tensor(RELU, device=device))
        module.tost_shape, module.tost_strength = self.shape, strength  # type: ignore[assignment]
        swap(module, mixin)

    def advance(self, model: nn.Module, clock: Clock) -> None:
        progress = clock.progress(self.until)
        beta = SCHEDULES[self.schedule](*self.beta)(progress) if progress < 1 else RELU
        strength = Strength.of(_walk(model))  # of the first: a walk through all modules in every step is not free
        if strength is not None and strength.follow(clock.step, beta, progress < 1):
            for module in _walk(model):
                module.tost_beta.fill_(beta)  # type: ignore[operator]

    def detach(self, model: nn.Module) -> None:
        for module in list(_walk(model)):
            module.tost_strength.end(module)  # type: ignore[operator]
            for mixin in (SoftReLU, SoftRoot):
                restore(module, mixin)
            del module.tost_beta, module.tost_shape, module.tost_strength
        for module in model.modules():
            restore(module, Spared)

    @contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        with quiet(Strength.of(_walk(model))):
            yield

    def metrics(self, model: nn.Module) -> dict[str, float]:
        strength: Any = next((module.tost_strength for module in _walk(model)), None)  # they have one between them
        live = bool(strength and strength.live)
        beta = strength.value if strength and live else self.beta[1]
        return {"tost/soft_activation/beta": beta, "tost/soft_activation/active": float(live)}


def _is_relu(module: nn.Module) -> bool:
    cls = original_class(module)
    return (issubclass(cls, nn.ReLU) and cls.forward is nn.ReLU.forward) or (
        issubclass(cls, nn.ReLU6) and cls.forward is nn.ReLU6.forward
    )


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if SoftReLU in mixins_of(m) or SoftRoot in mixins_of(m))
