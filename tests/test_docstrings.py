"""Whatever is public says what it is: modules, classes, functions, and methods, of which one that stands in for a documented
method of its base need not say it again."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import tost_plugins

NEEDS = {"composer": "composer", "transformers": "transformers", "accelerate": "accelerate", "lightning": "lightning"}


def modules() -> Iterator[ModuleType]:
    """All that can be imported here: an adapter, and a loop of a trainer, may lack its framework."""
    for info in pkgutil.walk_packages(tost_plugins.__path__, "tost_plugins."):
        own = info.name.rpartition(".")[2]
        if own != "__main__" and (own not in NEEDS or importlib.util.find_spec(NEEDS[own])):
            yield importlib.import_module(info.name)


def public(owner: Any, module: str) -> dict[str, Any]:
    """Name -> what a module or a class defines itself and does not hide."""
    found = {name: inspect.unwrap(value.fget if isinstance(value, property) else getattr(value, "__func__", value))
             for name, value in vars(owner).items() if not name.startswith("_")}  # fmt: skip
    return {name: value for name, value in found.items()
            if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == module}  # fmt: skip


def silent(module: ModuleType) -> Iterator[str]:
    """What says nothing, dotted."""
    if not module.__doc__:
        yield module.__name__
    for name, value in public(module, module.__name__).items():
        if not value.__doc__ or value.__doc__.startswith(f"{name}("):  # what a dataclass makes up
            yield f"{module.__name__}.{name}"
        for method, function in public(value, module.__name__).items() if inspect.isclass(value) else ():
            bases = [base for base in value.__mro__[1:] if base not in (nn.Module, object)]
            if not function.__doc__ and not any(getattr(vars(base).get(method), "__doc__", None) for base in bases):
                yield f"{module.__name__}.{name}.{method}"


def test_all_that_is_public_says_what_it_is() -> None:
    looked = list(modules())
    assert len(looked) > 120
    assert [name for module in looked for name in silent(module)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(): pass", ["f"]),
        ("def f():\n    'Says.'\ndef _g(): pass", []),
        ("class A:\n    'Says.'\n    def f(self): pass\n    @property\n    def g(self): pass", ["A.f", "A.g"]),
        ("class A:\n    'Says.'\n    def _f(self): pass\nclass _B: pass", []),
        ("class A:\n    'Says.'\n    def f(self):\n        'Says.'\nclass B(A):\n    'Says.'\n    def f(self): pass", []),
        ("from torch import nn\nclass A(nn.Module):\n    'Says.'\n    def forward(self, x): pass", ["A.forward"]),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int", ["A"]),
    ],
)  # fmt: skip
def test_the_look_finds(source: str, found: list[str]) -> None:
    module = ModuleType("made_up", "Says.")
    exec(source, module.__dict__ | {"__name__": "made_up"}, names := {})
    vars(module).update(names)
    assert list(silent(module)) == [f"made_up.{name}" for name in found]
