"""Activation sparsity: how many of a network's activations are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.training.calling import call
from tost_plugins.training.functions import RELUS, Instead
from tost_plugins.training.params import clean_name, device_of, plain_modules, unwrap
from tost_plugins.training.reading import reading
from tost_plugins.training.task import untouched

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Mish, nn.GELU, nn.ELU, nn.Hardswish)

#: A smooth activation is never exactly zero: what is smaller than this in magnitude counts as zero.
NEARLY_ZERO = 1e-6


def activation_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    threshold: float = NEARLY_ZERO,
    count: int | None = None,
    forward: Callable[[Callable[..., Any], Any], Any] = call,
) -> list[dict[str, Any]]:
    """A row per activation layer: `zeros`, the share of its outputs below `threshold` in magnitude, in percent.

    In eval mode, over the first `count` batches (all of them with None), each run as
    `forward(model, batch)`. Activations are the modules in `ACTIVATIONS`
    and calls of F.relu and its kin (named after the module that calls them), in the order in which they run. The
    model, its random states and its modes are left as they were. A functional relu that soft_activation is
    bending at the moment is not seen. Raises TostError where there is no activation at all.

    Paper: Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML 2022, table 1.
    Differs from the paper: nothing; the threshold is the paper's.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> activation_sparsity(net, [(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), None)])
        [{'layer': '0', 'activation': 'ReLU', 'outputs': 4, 'zeros': 50.0}]
    """
    model = unwrap(model)
    counter = _Counter(model, threshold)
    with reading(batches, device_of(model)) as found, untouched(model, train=False), torch.no_grad(), counter:
        for batch in islice(found or (), count):
            forward(model, batch)
    if not counter.counts:
        raise TostError(
            f"activation_sparsity: expected activations such as nn.ReLU or F.relu, got none in {type(model).__name__}; "
            f"they are looked for in {', '.join(kind.__name__ for kind in ACTIVATIONS)}"
        )
    return [
        {"layer": layer, "activation": kind, "outputs": total, "zeros": 100 * zeros / total}
        for (layer, kind), (zeros, total) in counter.counts.items()
    ]


class _Counter(Instead):
    """Counts what activation modules return, and what functional ones return outside of them."""

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__({func: partial(self._call, func) for func in RELUS})
        self.model, self.threshold = model, threshold
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}
        self.running: list[tuple[str, nn.Module]] = []

    def __enter__(self) -> _Counter:
        self.handles = []
        for name, module in plain_modules(self.model):
            self.handles.append(module.register_forward_pre_hook(self._entering(clean_name(name), module)))
            self.handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if self.running and not isinstance(self.running[-1][1], ACTIVATIONS):
            self._count(self.running[-1][0] or type(self.model).__name__, func.__name__, out)
        return out

    def _entering(self, name: str, module: nn.Module) -> Any:
        return lambda *_: self.running.append((name, module))

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        name, _ = self.running.pop()
        if isinstance(module, ACTIVATIONS) and isinstance(output, Tensor):
            kind = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn"))
            self._count(name or kind.__name__, kind.__name__, output)

    def _count(self, layer: str, kind: str, output: Tensor) -> None:
        zeros, total = self.counts.get((layer, kind), (0, 0))
        self.counts[layer, kind] = (zeros + int((output.abs() < self.threshold).sum()), total + output.numel())
