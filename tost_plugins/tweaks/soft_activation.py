"""Ghost soft activations: ReLU becomes a smooth curve that sharpens back into ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tost_plugins.errors import Inapplicable
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.functions import RELUS
from tost_plugins.training.params import device_of, plain_modules
from tost_plugins.training.schedules import SCHEDULES
from tost_plugins.tweaks.base import STRICT, Tweak
from tost_plugins.tweaks.surgery.swap import mixins_of, original_class, restore, swap
from tost_plugins.tweaks.surgery.trace import trace

#: The beta of a checkpoint from after the end: as good as ReLU, and within the range of half precision.
RELU = 1e4

Shape = Literal["pswish", "swish", "mish"]


def soft(x: Tensor, beta: Tensor | float, shape: Shape = "pswish", cap: float | None = None) -> Tensor:
    """The smooth stand-in for ReLU (for ReLU6 with `cap=6`), of the shape and dtype of x.

    pswish is x * sigmoid(beta * x): x / 2 at beta 0, swish at 1, ReLU as beta grows; swish and mish ignore beta.

    Example:
        >>> soft(torch.tensor([-1.0, 0.0, 1.0]), 100.0)
        tensor([-0., 0., 1.])
    """
    y = F.mish(x) if shape == "mish" else F.silu(x) if shape == "swish" else _pswish(x, beta)
    return y if cap is None else y.clamp(max=cap)


def _pswish(x: Tensor, beta: Tensor | float) -> Tensor:
    if not isinstance(beta, Tensor) or x.dtype == torch.float16:  # whose range beta * x may leave
        return x * torch.sigmoid(beta * x)
    beta = beta.clamp(min=1e-20)  # not 0, where the limit is the same
    return F.silu(beta * x).div_(beta)  # two thirds of the time, backward pass included


class SoftReLU:
    """Mixin for nn.ReLU and nn.ReLU6."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tost_live:  # type: ignore[attr-defined]
            return soft(x, self.tost_beta, self.tost_shape, self.tost_cap)  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]


class SoftRoot:
    """Mixin for a network, or a part of one, that calls relu as a function somewhere in its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.tost_live:  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _SoftFunctions(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _SoftFunctions(TorchFunctionMode):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELUS:
            x = args[0] if args else kwargs["input"]
            return soft(x, self.root.tost_beta, self.root.tost_shape, RELUS[func])  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SoftActivation(Tweak):
    """ReLU -> x * sigmoid(beta * x) with beta rising from `beta[0]` to `beta[1]`; from `until` on ReLU itself again.

    Acts on nn.ReLU, nn.ReLU6 (which keeps its cap) and on F.relu, torch.relu, Tensor.relu and F.relu6 in the
    network's own forward. `shape: swish` or `mish` is the same curve until the end, then ReLU.

    Fields: `until`, when the activation is exactly ReLU again; `beta`, its ends (0 is x / 2, 1 is swish, above 10 is
    close to ReLU); `schedule`, how beta rises.

    Paper: "Training Your Sparse Neural Network Better with Any Mask" (Jaiswal et al., ICML 2022), section 3.
    Differs from the paper: the text gives no schedule for beta; ours is in docs/schedules.md with what was measured.

    Example:
        >>> SoftActivation(until="60ep", beta=(1, 10)).beta
        (1.0, 10.0)
    """

    kind: Literal["soft_activation"] = "soft_activation"
    optional: bool = False
    until: TimeField = Time(0.1, "dur")
    shape: Shape = "pswish"
    beta: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 100.0)
    schedule: Literal["constant", "linear", "cosine", "geometric"] = "geometric"

    def attach(self, model: nn.Module, seed: int) -> None:
        modules, found = dict(plain_modules(model)), trace(model)
        relus = [module for module in modules.values() if _is_relu(module)]
        callers = [""] if found is None else found.relu_callers
        if not relus and not callers:
            raise Inapplicable(
                f"soft_activation: expected nn.ReLU, nn.ReLU6 or F.relu, got none in "
                f"{type(model).__name__}; leave soft_activation out, or mark it `optional: true`"
            )
        for module in relus:
            self._soften(module, SoftReLU, device_of(model), 6.0 if isinstance(module, nn.ReLU6) else None)
        # the callers beside the root: gradient checkpointing runs a block again when the root's forward is over
        for path in dict.fromkeys(["", *callers] if callers else []):
            self._soften(modules[path], SoftRoot, device_of(model), None)

    def _soften(self, module: nn.Module, mixin: type, device: torch.device, cap: float | None) -> None:
        module.register_buffer("tost_beta", torch.tensor(self.beta[0], device=device))
        module.tost_shape, module.tost_cap, module.tost_live = self.shape, cap, True  # type: ignore[assignment]
        swap(module, mixin)

    def advance(self, model: nn.Module, clock: Clock) -> None:
        progress = clock.progress(self.until)
        first = next(_walk(model), None)
        if first is None or (progress >= 1 and not first.tost_live):
            return  # over: nothing to write, and a walk through the modules in every step is not free
        beta = SCHEDULES[self.schedule](*self.beta)(progress)
        for module in _softened(model):
            module.tost_live = progress < 1  # type: ignore[assignment]
            module.tost_beta.fill_(beta if progress < 1 else RELU)  # type: ignore[operator]

    def detach(self, model: nn.Module) -> None:
        for module in _softened(model):
            for mixin in (SoftReLU, SoftRoot):
                restore(module, mixin)
            del module.tost_beta, module.tost_shape, module.tost_cap, module.tost_live

    @contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        states = [(module, module.tost_live) for module in _softened(model)]
        for module, _ in states:
            module.tost_live = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, live in states:
                module.tost_live = live

    def metrics(self, model: nn.Module) -> dict[str, float]:
        first = next(_walk(model), None)  # they are all alike
        live = first is not None and bool(first.tost_live)
        beta = float(first.tost_beta) if first is not None and live else self.beta[1]  # type: ignore[arg-type]
        return {"tost/soft_activation/beta": beta, "tost/soft_activation/active": float(live)}


def _is_relu(module: nn.Module) -> bool:
    cls = original_class(module)
    return (issubclass(cls, nn.ReLU) and cls.forward is nn.ReLU.forward) or (
        issubclass(cls, nn.ReLU6) and cls.forward is nn.ReLU6.forward
    )


def _softened(model: nn.Module) -> list[nn.Module]:
    return list(_walk(model))


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if SoftReLU in mixins_of(m) or SoftRoot in mixins_of(m))
