"""Imports point one way: read from the source here, and seen in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The lowest first: a module imports from its own layer and from lower ones.
LAYERS = [
    {"errors"},
    {"clock", "schedules", "params", "ranks", "log", "task", "surgery", "optional", "optimizing", "seeds"}
    | {"rng", "files", "sharding", "pickles", "plain_yaml"},
    {"masks", "tweaks"},
    {"buffers", "moving", "gradients", "zeros"},
    {"session"},
    {"hooks", "averages", "recipe", "study", "report", "page", "export"},
    {"__init__"},  # the public names: for users; no lower module leans on them
    {"models", "data", "checkpoints"},
    {"sources"},
    {"train"},
    {"loops"},  # one per trainer, loaded by `train` under its name; knows that framework and its adapter
    {"lottery"},
    {"grid"},
    {"compare", "studies"},
    {"reproduce", "progress"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Part of one idea that is split over two files: an import inside a function may point the other way.
UPWARD_IN_FUNCTIONS = {("session", "hooks"), ("session", "averages"), ("session", "recipe")}

# What the core must work without, and the files that may import it inside functions.
OUTSIDE = {"composer", "transformers", "accelerate", "datasets"} | {
    "torchvision",
    "timm",
    "sklearn",
    "matplotlib",
    "scipy",
}
ADAPTERS = "tost_plugins.adapters"
MAY_REACH_OUTSIDE = {"models", "sources", "train", "report", "cli"}


class Import(NamedTuple):
    target: str  # dotted and absolute: "torch.nn", "tost_plugins.masks.mask"
    deferred: bool  # inside a function or under TYPE_CHECKING: not carried out when the module is imported


def imports_of(source: str, package: str) -> Iterator[Import]:
    """The imports of a module that lies in `package`; of `from a import b` the target is a.b."""

    folders = package.split(".")

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, deferred) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = folders[: len(folders) + 1 - level] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                yield from (Import(f"{prefix}.{alias.name}", deferred) for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("import_module", "importlib.import_module", "__import__"):
                    yield Import(name, deferred)
        deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        deferred |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    return visit(ast.parse(source), False)


def part_of(module: str) -> str:
    """Which entry of LAYERS a name in tost_plugins belongs to; one that is no module is a public name."""
    first = module.split(".")[1] if "." in module else "__init__"
    modules = LEVEL.keys() | {path.stem for path in (ROOT / "tost_plugins").iterdir()}
    return first if first in modules else "__init__"


def complaint(module: str, found: Import) -> str | None:
    """Why a core module ("tost_plugins.masks.rigl") may not import this, if it may not."""
    own, top = part_of(module), found.target.split(".")[0]
    if top in OUTSIDE | {"adapters"} or found.target.startswith(ADAPTERS):
        public_name = own == "__init__" and top == "tost_plugins"
        if found.deferred and (own in MAY_REACH_OUTSIDE or public_name):
            return None
        trainer = module.split(".")[-1]
        if own == "loops" and trainer in found.target.removeprefix(f"{ADAPTERS}.").split(".")[:1]:
            return None
        return f"{module} imports {found.target}: the core works without it"
    if top != "tost_plugins":
        return None
    other = part_of(found.target)
    if {own, other} == {"masks", "tweaks"}:
        return f"{module} imports {found.target}: masks and tweaks do not know each other"
    if own == other == "loops" and module.split(".")[2] != "__init__":
        return f"{module} imports {found.target}: no loop knows another"
    if not {own, other} <= LEVEL.keys():
        return f"{module} imports {found.target}: one of them has no place in LAYERS yet"
    if LEVEL[other] > LEVEL[own] and not (found.deferred and (own, other) in UPWARD_IN_FUNCTIONS):
        return f"{module} imports {found.target}, which stands above it"
    return None


def core_modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "tost_plugins").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def check(module: str, source: str) -> list[str]:
    package = module.rpartition(".")[0]
    return [text for found in imports_of(source, package) if (text := complaint(module, found))]


def test_every_module_has_its_place() -> None:
    names = {module.split(".")[1] for module, _ in core_modules()}
    assert names, "no module found"
    assert names <= LEVEL.keys(), f"give these a place in LAYERS: {sorted(names - LEVEL.keys())}"


def test_imports_point_one_way() -> None:
    assert [text for module, path in core_modules() for text in check(module, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from tost_plugins import clock"),
        ("errors", "from . import clock"),
        ("errors", "from .clock import Time"),
        ("clock", "import tost_plugins.session"),
        ("params", "from tost_plugins import Mask"),
        ("params", "import tost_plugins"),
        ("masks.rigl", "from ..tweaks import ghost_skip"),
        ("masks.rigl", "from ..session import Session"),
        ("masks.rigl", "def f():\n    from tost_plugins.recipe import Recipe"),
        ("masks.__init__", "from ..tweaks.ghost_skip import GhostSkip"),
        ("tweaks.ghost_skip", "from tost_plugins.masks.mask import Mask"),
        (
            "tweaks.ghost_skip",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..masks.mask import Mask",
        ),
        ("session", "from tost_plugins.recipe import Recipe"),
        ("session", "if True:\n    from .hooks import drive"),
        ("hooks", "def f():\n    from tost_plugins.train import train"),
        ("hooks", "def f():\n    import torchvision.models"),
        ("hooks", "def f():\n    import importlib\n    importlib.import_module('composer.core')"),
        ("recipe", "from tost_plugins.models import resnet20"),
        ("__init__", "from tost_plugins.adapters.composer import TostAlgorithm"),
        ("__init__", "def __getattr__(name):\n    import composer"),
        ("train", "import transformers"),
        ("train", "from tost_plugins import adapters"),
        ("train", "def f():\n    import tost_plugins.loops.composer"),
        ("loops.torch", "import composer"),
        ("loops.accelerate", "from tost_plugins.adapters.composer import TostAlgorithm"),
        ("loops.accelerate", "from .composer import run"),
        ("cli", "class A:\n    import matplotlib.pyplot as plt"),
        ("clock", "import adapters.composer"),
    ],
)
def test_the_check_finds(module: str, source: str) -> None:
    assert len(check(f"tost_plugins.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clock", "import torch\nfrom tost_plugins.errors import TostError"),
        ("task", "from .params import prunable"),
        ("masks.rigl", "from . import set\nfrom .mask import Mask\nfrom ..errors import TostError"),
        ("masks.__init__", "from . import rigl\nfrom .mask import Mask"),
        ("session", "def build():\n    from tost_plugins.recipe import Recipe"),
        ("session", "from tost_plugins import masks, tweaks"),
        ("__init__", "from tost_plugins.recipe import Recipe"),
        ("__init__", "def __getattr__(name):\n    from tost_plugins.adapters.composer import TostAlgorithm"),
        (
            "train",
            "def f():\n    import composer\n    from tost_plugins.adapters.composer import TostAlgorithm",
        ),
        (
            "loops.composer",
            "from composer import Trainer\nfrom tost_plugins.adapters.composer import TostAlgorithm",
        ),
        ("loops.composer", "from tost_plugins.train import Job"),
        ("cli", "from tost_plugins import Recipe, train"),
        ("__main__", "from .cli import main"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    assert check(f"tost_plugins.{module}", source) == []


def other_adapters(name: str, source: str) -> list[str]:
    """What the adapter `name` imports from the adapters' folder besides itself."""
    found = (each.target.removeprefix("tost_plugins.").split(".") for each in imports_of(source, ADAPTERS))
    return [".".join(parts) for parts in found if parts[0] == "adapters" and parts[1:2] != [name]]


def test_no_adapter_imports_another() -> None:
    adapters = sorted((ROOT / "adapters").glob("*.py"))
    assert [text for path in adapters for text in other_adapters(path.stem, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from tost_plugins.adapters.accelerate import TostHook",
        "from tost_plugins.adapters import accelerate",
        "from .accelerate import TostHook",
        "def f():\n    from . import accelerate",
        "import tost_plugins.adapters.accelerate",
        "import adapters",
    ],
)
def test_the_check_finds_an_adapter(source: str) -> None:
    assert len(other_adapters("composer", source)) == 1
    assert other_adapters("composer", "import composer\nfrom composer.core import Event") == []


def python(statements: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs statements in a fresh interpreter whose first place to look for modules is `folder`."""
    command = [sys.executable, "-c", statements]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def outside_after(statements: str, folder: Path) -> set[str]:
    """Which of OUTSIDE are loaded once the statements ran."""
    shown = python(f"{statements}\nimport sys\nprint(*set({sorted(OUTSIDE)}) & sys.modules.keys())", folder)
    assert shown.returncode == 0, shown.stderr
    return set(shown.stdout.split())


def test_import_loads_nothing_outside(tmp_path: Path) -> None:
    assert outside_after("import tost_plugins", tmp_path) == set()


def test_the_look_at_loaded_modules_finds(tmp_path: Path) -> None:
    (tmp_path / "timm.py").touch()
    assert outside_after("import tost_plugins, timm", tmp_path) == {"timm"}


@pytest.mark.parametrize("name", ["adapters", "recipes"])
def test_folders_import_under_their_own_name_only(name: str, tmp_path: Path) -> None:
    wrong = python(f"import {name}", ROOT)
    assert wrong.returncode != 0
    assert f"ImportError: {name}: expected to be imported as 'tost_plugins.{name}'" in wrong.stderr
    right = python(f"import tost_plugins.{name}", tmp_path)
    assert right.returncode == 0, right.stderr
