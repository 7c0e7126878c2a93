"""The house keeps its order: imports point one way, as each room's own first lines say, and no file or function outgrows a
reader. Read from the source here, and seen in a fresh interpreter."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tost_plugins"
ADAPTERS = "tost_plugins.adapters"

# What the core must work without, and the rooms that may import it inside functions, where it is used.
OUTSIDE = {
    "composer",
    "transformers",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "datasets",
    "torchvision",
    "timm",
    "sklearn",
    "matplotlib",
    "scipy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "ray",
}
MAY_REACH_OUTSIDE = {"lab"}

# A recipe builds a session and a session reads recipes: one of the two asks the front door.
ASKS_THE_FRONT_DOOR = {"tost_plugins.session.session"}

MOST_ENTRIES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 13, 300, 50


class Import(NamedTuple):
    target: str  # dotted and absolute: "torch.nn", "tost_plugins.masks.mask.Mask"
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


def core_modules() -> dict[str, str]:
    """Dotted name -> source of every module of the package, adapters and recipes apart; a folder's is a.b.__init__."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def rooms(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Room ("masks", "masks.methods") -> what the first lines of its `__init__` say that it may import."""
    found = {}
    for name, source in modules.items():
        if name.endswith(".__init__") and name.count(".") > 1:
            said = re.search(r"May import: ([\w, .]+)\.", ast.get_docstring(ast.parse(source)) or "")
            assert said, f"{name}: expected a line 'May import: ...' in its docstring"
            found[name.removeprefix("tost_plugins.").removesuffix(".__init__")] = set(said[1].split(", "))
    return found


def room_of(module: str, allowed: Mapping[str, set[str]]) -> str:
    """The innermost room that a module or a name in it belongs to; "errors" and "__init__" stand at the front door."""
    parts = module.split(".")[1:]
    inside = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in inside if name in allowed), parts[0] if parts else "__init__")


def complaint(module: str, found: Import, allowed: Mapping[str, set[str]]) -> str | None:
    """Why a core module ("tost_plugins.masks.topk") may not import this, if it may not."""
    own, top = room_of(module, allowed), found.target.split(".")[0]
    if top in OUTSIDE | {"adapters"} or found.target.startswith(ADAPTERS):
        front = own == "__init__" and top == "tost_plugins"
        loop = own == "lab.loops" and module.split(".")[-1] in found.target.removeprefix(f"{ADAPTERS}.").split(".")[:1]
        if loop or (found.deferred and (front or own.split(".")[0] in MAY_REACH_OUTSIDE)):
            return None
        return f"{module} imports {found.target}: the core works without it"
    if top != "tost_plugins" or own in ("__init__", "__main__"):
        return None
    other = room_of(found.target, allowed)
    if found.deferred and own.split(".")[0] not in MAY_REACH_OUTSIDE:
        return f"{module} imports {found.target} where it is not seen: put it at the top"
    if found.target == "tost_plugins" and module in ASKS_THE_FRONT_DOOR:
        return None
    inside = other == own or other.startswith(f"{own}.")  # its own inner rooms
    if inside or {other, other.split(".")[0]} & allowed.get(own, set()):
        return None
    return f"{module} imports {found.target}: {own} may not import {other}"


def complaints(modules: Mapping[str, str]) -> list[str]:
    allowed = rooms(modules)
    return [
        text
        for module, source in modules.items()
        for found in imports_of(source, module.rpartition(".")[0])
        if (text := complaint(module, found, allowed))
    ]


def arrows(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """File -> the files of the package that it imports, inside functions too; the front door loads all, lazily, and is none."""

    def file_of(target: str) -> str | None:
        parts = target.split(".")
        for end in range(len(parts), 1, -1):
            for name in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
                if name in modules:
                    return name
        return None

    found = {}
    for module, source in modules.items():
        if module.count(".") > 1:
            targets = {file_of(each.target) for each in imports_of(source, module.rpartition(".")[0])}
            found[module] = {target for target in targets if target and target != module}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The files on circles of imports: those are left when what imports nothing, and what nobody imports, is tidied away."""
    left = {name: set(targets) & graph.keys() for name, targets in graph.items()}
    while True:
        imported = set().union(*left.values())
        ends = [name for name, targets in left.items() if not targets & left.keys() or name not in imported]
        if not ends:
            return [sorted(left)] if left else []
        left = {name: targets - set(ends) for name, targets in left.items() if name not in ends}


def functions_of(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, less its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = node.body[0] if ast.get_docstring(node) else None
            lines = (node.end_lineno or 0) - node.lineno + 1
            yield node.name, lines - ((text.end_lineno or 0) - text.lineno + 1 if text else 0)


def test_few_rooms() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_imports_point_one_way() -> None:
    assert complaints(core_modules()) == []


def test_no_circles() -> None:
    graph = arrows(core_modules())
    assert sum(map(len, graph.values())) > 100, "hardly any import found: the check is broken"
    assert circles(graph) == []


def test_no_room_imports_one_that_imports_it() -> None:
    allowed = {room: others for room, others in rooms(core_modules()).items() if "." not in room}
    assert len(allowed) > 5
    assert circles(allowed) == []


def test_files_and_functions_stay_short() -> None:
    folders = [path for folder in (PACKAGE, ROOT / "adapters", ROOT / "benchmarks") for path in folder.rglob("*.py")]
    long = [f"{path}: {lines}" for path in folders if (lines := len(path.read_text("utf-8").splitlines())) > MOST_LINES]
    long += [
        f"{path} {name}: {lines}"
        for path in folders
        for name, lines in functions_of(path.read_text("utf-8"))
        if lines > MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.clock", "import tost_plugins.session"),
        ("training.clock", "from ..session.session import Session"),
        ("training.params", "from tost_plugins import Mask"),
        ("training.params", "import tost_plugins"),
        ("masks.topk", "from tost_plugins.session.buffers import names"),
        ("masks.methods.rigl", "from ...tweaks import ghost_skip"),
        ("masks.methods.rigl", "from tost_plugins.session import Session"),
        ("masks.methods.rigl", "def f():\n    from tost_plugins.recipe import Recipe"),
        ("tweaks.ghost_skip", "from tost_plugins.masks.mask import Mask"),
        ("tweaks.ghost_skip", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..masks.mask import Mask"),
        ("session.session", "from tost_plugins.recipe import Recipe"),
        ("session.buffers", "import tost_plugins"),
        ("session.session", "def f():\n    from tost_plugins.session.buffers import names"),
        ("session.session", "def f():\n    import importlib\n    importlib.import_module('composer.core')"),
        ("recipe.recipe", "from tost_plugins.lab.models import resnet20"),
        ("__init__", "from tost_plugins.adapters.composer import TostAlgorithm"),
        ("__init__", "def __getattr__(name):\n    import composer"),
        ("lab.train", "import transformers"),
        ("lab.train", "from tost_plugins import adapters"),
        ("lab.loops.torch", "import composer"),
        ("lab.loops.accelerate", "from tost_plugins.adapters.composer import TostAlgorithm"),
        ("lab.report", "class A:\n    import matplotlib.pyplot as plt"),
        ("training.clock", "import adapters.composer"),
    ],
)
def test_the_check_finds(module: str, source: str) -> None:
    name = f"tost_plugins.{module}"
    allowed = rooms(core_modules())
    found = [complaint(name, each, allowed) for each in imports_of(source, name.rpartition(".")[0])]
    assert len([text for text in found if text]) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.clock", "import torch\nfrom tost_plugins.errors import TostError"),
        ("training.task", "from .params import prunable"),
        ("masks.methods.rigl", "from . import set\nfrom ..mask import Mask\nfrom ...errors import TostError"),
        ("masks.methods.__init__", "from . import rigl\nfrom ..mask import Mask"),
        ("session.session", "import tost_plugins\nfrom tost_plugins import masks, tweaks"),
        ("__init__", "from tost_plugins.recipe import Recipe"),
        ("__init__", "def __getattr__(name):\n    from tost_plugins.adapters.composer import TostAlgorithm"),
        ("lab.train", "def f():\n    import composer\n    from tost_plugins.adapters.composer import TostAlgorithm"),
        (
            "lab.loops.composer",
            "from composer import Trainer\nfrom tost_plugins.adapters.composer import TostAlgorithm",
        ),
        ("__main__", "from tost_plugins.lab.cli import main"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    name = f"tost_plugins.{module}"
    allowed = rooms(core_modules())
    assert [complaint(name, each, allowed) for each in imports_of(source, name.rpartition(".")[0])] == [None] * len(
        list(imports_of(source, name.rpartition(".")[0]))
    )


def test_the_check_finds_a_circle_and_what_is_long() -> None:
    modules = core_modules()
    modules["tost_plugins.training.log"] += "\ndef f():\n    from tost_plugins.training import task\n"
    modules["tost_plugins.training.task"] += "\nfrom tost_plugins.training import log\n"
    assert circles(arrows(modules)) == [["tost_plugins.training.log", "tost_plugins.training.task"]]
    assert dict(functions_of("def f():\n    '''Two\n    lines.'''\n    return 1\n")) == {"f": 2}


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
    assert (
        outside_after("import tost_plugins; tost_plugins.Session, tost_plugins.Recipe, tost_plugins.masks", tmp_path)
        == set()
    )


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
