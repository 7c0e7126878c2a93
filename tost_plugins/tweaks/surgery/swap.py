"""Give a module another forward for a while, and give it its own back, exactly.

The module object, its parameters and their names stay: only its class changes, to a subclass of a mixin and of the
class it had. Optimizers, aliases, EMA copies, `deepcopy` and `pickle` keep working.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def swap(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the module's class; its `forward` may call `super().forward`. Twice is once."""
    mixins = mixins_of(module)
    if mixin not in mixins:
        module.__class__ = _combined(_base(module), (mixin, *mixins))


def restore(module: nn.Module, mixin: type) -> None:
    """Take `mixin` away again, in any order among several; without it nothing happens."""
    mixins = tuple(m for m in mixins_of(module) if m is not mixin)
    _become(module, _combined(_base(module), mixins) if mixins else _base(module))


def mixins_of(module: nn.Module) -> tuple[type, ...]:
    """The mixins a module carries now, the outermost first."""
    return getattr(type(module), "tost_mixins", ())


def original_class(module: nn.Module) -> type:
    """The class the module had before any swap."""
    return _base(module)


def _become(module: nn.Module, cls: type) -> None:
    """Change the class that we gave, below what others have put on top of it since, as fully_shard does."""
    outer = type(module)
    ours = next((below for below in outer.__mro__ if "tost_mixins" in vars(below)), outer)
    if ours is not outer:
        own = {name: value for name, value in vars(outer).items() if name not in ("__dict__", "__weakref__")}
        cls = type(outer.__name__, tuple(cls if base is ours else base for base in outer.__bases__), own)
    module.__class__ = cls


def _base(module: nn.Module) -> type:
    return getattr(type(module), "tost_base", type(module))


@functools.cache
def _combined(base: type, mixins: tuple[type, ...]) -> type:
    special = hasattr(
        base, "__deepcopy__"
    )  # torch.fx makes a class for every copy, and leaves out what it did not know

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        with _as(self, base):
            make, args, *rest = self.__reduce_ex__(protocol)
        return (_rebuild, (mixins, self._buffers if special else {}, make, *args), *rest)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        with _as(self, base):
            twin = _rebuild(mixins, copy.deepcopy(self._buffers, memo), copy.deepcopy, self, memo)
        twin.__dict__ |= {
            name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in vars(twin)
        }
        return twin

    chain = type(base.__name__, (*mixins, base), {})

    # trainers read the signature of forward (Hugging Face drops columns by it), so it must be the original's
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # mixed precision binds the forward to the instance: it may be called when the class is another one again
        return (chain if isinstance(self, chain) else type(self)).forward(self, *args, **kwargs)

    names = {
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "tost_base": base,
        "tost_mixins": mixins,
    }
    if special:
        names["__deepcopy__"] = __deepcopy__
    return type(base.__name__, (chain,), names)


@contextlib.contextmanager
def _as(module: nn.Module, cls: type) -> Iterator[None]:
    own, module.__class__ = type(module), cls
    try:
        yield
    finally:
        module.__class__ = own


def _rebuild(
    mixins: tuple[type, ...], buffers: dict[str, Any], make: Callable[..., nn.Module], *args: Any
) -> nn.Module:
    """The module as its own class makes it, with the buffers that it may lack, and with the mixins on."""
    module = make(*args)
    for name in buffers.keys() - vars(module).get("_buffers", buffers).keys():
        module._buffers[name] = buffers[name]
    module.__class__ = _combined(type(module), mixins)
    return module
