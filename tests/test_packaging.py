"""What is shipped, and that a test which should run cannot be skipped unseen."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {f"tost_plugins/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "tost_plugins").rglob("*.py")}
MODULES |= {f"tost_plugins/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")}
PUBLISHED = {str(path.relative_to(ROOT)) for path in (ROOT / "tost_plugins").rglob("*.csv")}

# Read in an environment that has the package, from a folder that is not the checkout.
LOOK = """
import importlib.metadata, importlib.resources, importlib.util
import tost_plugins, tost_plugins.adapters
assert importlib.metadata.version("tost_plugins") == tost_plugins.__version__
for name in ("adapters", "recipes"):
    assert importlib.util.find_spec(name) is None, f"a top-level {name} was installed"
(script,) = importlib.metadata.entry_points(group="console_scripts", name="tost")
(entry,) = importlib.metadata.entry_points(group="llmfoundry_algorithms", name="tost")
assert (script.value, entry.module) == ("tost_plugins.__main__:main", "tost_plugins.adapters.composer")
print(tost_plugins.__file__)
for file in importlib.resources.files("tost_plugins.recipes").iterdir():
    if file.name.endswith(".yaml"):
        assert file.read_text()
        print(f"tost_plugins/recipes/{file.name}")
"""


@pytest.fixture(autouse=True)
def _only_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a checkout on it would stand before what was installed


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=600, check=False
    )


def output_of(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is shipped, so that no build touches the checkout."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("tost_plugins", "adapters", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(what: str, tree: Path, folder: Path) -> Path:
    """Builds an "sdist", a "wheel", or the wheel that stands for an "editable" install, as pip does."""
    hook = f"import sys; from setuptools.build_meta import build_{what}; build_{what}(sys.argv[1])"
    folder.mkdir()
    output_of(sys.executable, "-c", hook, folder, cwd=tree)
    (built,) = folder.iterdir()
    return built


class Environment:
    """A fresh virtual environment that has one wheel of tost_plugins, and borrows what that needs."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder)
        self.folder = folder
        pip = [sys.executable, "-m", "pip", "--python", folder, "install", "--quiet"]
        output_of(*pip, "--no-index", "--no-deps", wheel, cwd=folder)

    def run(self, command: str, *args: str) -> str:
        """What one of the environment's own commands prints."""
        (packages,) = self.folder.glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        return output_of(self.folder / "bin" / command, *args, cwd=self.folder)

    def look(self) -> tuple[Path, set[str]]:
        """Where tost_plugins lies, and the recipes that it finds."""
        borrowed = [path for path in sys.path if path.endswith("-packages")]
        statements = f"import sys; sys.path += {borrowed}\n{LOOK}"
        shown = output_of(self.folder / "bin" / "python", "-c", statements, cwd=self.folder)
        place, *recipes = shown.splitlines()
        return Path(place).parent, set(recipes)


def test_wheel_through_sdist(tree: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")

    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= MODULES | RECIPES | PUBLISHED and len(PUBLISHED) == 2
    assert {name.split("/")[0] for name in names} == {"tost_plugins", "tost_plugins-0.1.0.dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)

    fresh = Environment(tmp_path / "fresh", wheel)
    place, recipes = fresh.look()
    assert place.is_relative_to(fresh.folder)
    assert recipes == RECIPES

    short = ("--set", "duration=2ep", "--set", "tweaks.2.iterations=1", "--json")
    result = json.loads(fresh.run("tost", "train", "quickstart", *short, "--out", "run"))
    assert (
        result["trainer"] == "torch"
        and result["test_accuracy"] > 15
        and (fresh.folder / "run" / "mask.safetensors").exists()
    )


def test_what_is_imported_is_declared() -> None:
    """The base installs what the package asks for by itself, and an extra what an adapter or the lab asks for."""
    import tomllib  # new in Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    base, *extras = (
        {re.split(r"[\W]", line.replace("-", "_"))[0] for line in lines}
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
    )
    called = {"pyyaml": "yaml", "scikit_learn": "sklearn", "mosaicml": "composer", "pillow": "PIL"}
    base, all_of_them = ({called.get(name, name) for name in names} for names in (base, base.union(*extras)))
    python = sys.stdlib_module_names | {"tost_plugins", "pytorch_lightning"}  # lightning's older name
    for path in [*(ROOT / "tost_plugins").rglob("*.py"), *(ROOT / "adapters").glob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        assert imported(ast.walk(tree)) <= all_of_them | python, path
        at_once, own = imported(tree.body), {"adapters", "loops"} & set(path.parts)  # a trainer's own files need it
        assert own or at_once <= base | python, path


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages that these statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return {name.partition(".")[0] for name in found}


def test_editable_installs_of_one_checkout(tree: Path, tmp_path: Path) -> None:
    one = Environment(tmp_path / "one", build("editable", tree, tmp_path / "wheel of one"))
    two = Environment(tmp_path / "two", build("editable", tree, tmp_path / "wheel of two"))
    assert one.look() == two.look() == (tree / "tost_plugins", RECIPES)
    shutil.rmtree(two.folder)
    (tree / "recipes" / "new.yaml").write_text("name: new\n")
    assert one.look() == (tree / "tost_plugins", RECIPES | {"tost_plugins/recipes/new.yaml"})


def test_every_package_is_listed() -> None:
    import tomllib  # new in Python 3.11

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert {str(Path(module).parent).replace("/", ".") for module in MODULES} <= set(listed)


MAY_BE_SKIPPED = """
import pytest

def test_passes(): pass
def test_no_gpu(): pytest.skip("no GPU")
def test_no_data(): pytest.skip("CIFAR-10 data not found: set TOST_DATA")
def test_absent_on_purpose(): pytest.importorskip("left_out.inner")
def test_fails_as_known(): pytest.xfail("known")
"""
MUST_RUN = """
import pytest

def test_passes(): pass
def test_absent_by_mistake(): pytest.importorskip("not_there")
def test_left_for_later(): pytest.skip("flaky")
@pytest.mark.skipif(True, reason="no GPU today")
def test_marked(): pass
"""


@pytest.mark.parametrize(
    ("source", "workers", "complaints"),
    [
        (MAY_BE_SKIPPED, "1", []),
        (MUST_RUN, "0", ["test_absent_by_mistake", "test_left_for_later", "test_marked"]),
        (MUST_RUN, "1", ["test_absent_by_mistake", "test_left_for_later", "test_marked"]),
        ("import pytest\npytest.importorskip('not_there')", "1", ["test_it.py", "no test ran"]),
    ],
    ids=["may be skipped", "must run", "must run, with workers", "whole file"],
)
def test_a_skip_that_is_not_allowed_fails_the_run(
    source: str, workers: str, complaints: list[str], tmp_path: Path
) -> None:
    shutil.copy(ROOT / "tests" / "skips.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(source)
    command = (sys.executable, "-m", "pytest", "-n", workers)
    done = run(*command, cwd=tmp_path, TOST_ALLOW_SKIPS="left_out", PYTEST_ADDOPTS="")
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert (done.returncode == 0) == (not complaints), done.stdout
    assert len(lines) == len(complaints), done.stdout
    assert all(text in line for text, line in zip(complaints, lines, strict=True)), done.stdout
