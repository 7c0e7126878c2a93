"""What README, docs and docstrings show runs, and names what there is."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

import tost_plugins
from tost_plugins import Recipe
from tost_plugins.lab.studies.registry import STUDIES
from tost_plugins.masks import MASKS
from tost_plugins.tweaks import TWEAKS

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"composer": "composer", "transformers": "transformers", "accelerate": "accelerate"}
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(tost_plugins.__path__, "tost_plugins.")
    if ".loops." not in info.name and "__main__" not in info.name
)


def blocks(path: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    needed = NEEDS.get(name.rpartition(".")[2]) if ".adapters." in name else None
    if needed:
        pytest.importorskip(needed)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_examples_are_many() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES if ".adapters." not in name]
    assert sum(bool(found.examples) for module in modules for found in finder.find(module)) > 25


def test_the_masks_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/masks.md"):
        exec(block, {})
    assert (tmp_path / "mask.safetensors").exists()


def test_the_formats_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/formats.md"):
        exec(block, {})
    assert (tmp_path / "mask.safetensors.card.md").exists()


def test_the_export_page_runs() -> None:
    for block in blocks("docs/export.md"):
        exec(block, {})


def test_the_readme_loop_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(recipe.replace("rescaled_init}", "rescaled_init, iterations: 1}"))
    loop = next(block for block in blocks("README.md") if "session.drive" in block)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    keys = list(model.state_dict())
    data = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(4)]
    exec(loop, {"torch": torch, "model": model, "train_loader": data, "epochs": 2})
    kept = sum(int(model[i].weight.count_nonzero()) for i in (0, 3, 7))
    assert kept <= round(0.02 * sum(model[i].weight.numel() for i in (0, 3, 7)))
    assert list(model.state_dict()) == keys


def test_the_studies_page_runs_and_names_every_study() -> None:
    pytest.importorskip("scipy")
    for block in blocks("docs/studies/README.md"):
        exec(block, {})
    assert all(f"| `{name}` |" in (ROOT / "docs/studies/README.md").read_text() for name in STUDIES)


def test_the_recipes_in_the_pages_are_recipes() -> None:
    (watch,) = blocks("docs/session.md", "yaml")
    assert len(Recipe.of("tost_any_mask", **yaml.safe_load(watch)).watch.measures) == 4
    (recipe,) = blocks("docs/recipe.md", "yaml")
    shown = [tweak.kind for tweak in Recipe.from_dict(yaml.safe_load(recipe)).tweaks]
    assert shown == ["ghost_skip", "soft_activation", "rescaled_init", "label_smoothing"]  # the four of ToST
    assert all(f"`{key}`" in (ROOT / "docs/recipe.md").read_text() for key in Recipe.model_fields)


def test_the_pages_name_every_method_and_tweak() -> None:
    masks, tweaks = ((ROOT / "docs" / page).read_text() for page in ("masks.md", "tweaks.md"))
    assert [kind for kind in MASKS if f"`{kind}`" not in masks] == [], "give these a row in docs/masks.md"
    assert [kind for kind in TWEAKS if f"## {kind}" not in tweaks] == [], "give these a section in docs/tweaks.md"
    shared = {"optional", "least_steps"}
    shown = [yaml.safe_load(line) for line in re.findall(r"^`({kind: .*})`$", tweaks, re.MULTILINE)]
    defaults = [
        TypeAdapter[Any](TWEAKS[each["kind"]]).dump_python(TWEAKS[each["kind"]](), mode="json") for each in shown
    ]
    assert shown == [{name: each[name] for name in each if name not in shared} for each in defaults], "say all defaults"
    assert sorted(each["kind"] for each in shown) == sorted(TWEAKS)


# ---- what the pages point at is there

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def anchors(page: str) -> set[str]:
    """What its headings are called in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lost_links(text: str, folder: Path) -> Iterator[str]:
    """Links to files that are not there, and to headings that their page does not have."""
    for link, target, anchor in re.findall(r"\]\((([^)#\s]*)(?:#([^)\s]*))?)\)", text):
        there = folder / target
        if not target.startswith("http"):
            found = there.exists() and (not anchor or anchor in anchors(there.read_text() if target else text))
            yield from () if found else (link,)


def lost_paths(text: str) -> Iterator[str]:
    """Files of the repository that are not there, and tests that their file does not have."""
    folders = "tests|benchmarks|adapters|recipes|docs|tost_plugins"
    for path, test in re.findall(rf"[` ]((?:{folders})/[\w/.-]*\w)(?:::(\w+))?", text):
        there, made_up = ROOT / path, "KIND" in path
        if not made_up and not (there.exists() and (not test or f"def {test}(" in there.read_text())):
            yield f"{path}::{test}" if test else path


def lost_names(text: str) -> Iterator[str]:
    """Dotted names in the package that nothing answers to; adapters are looked for only, since their frameworks may be absent."""
    for name in re.findall(r"\btost_plugins(?:\.\w+)+", text):
        try:
            if name.startswith("tost_plugins.adapters.") or name == "tost_plugins.adapters":
                assert importlib.util.find_spec(".".join(name.split(".")[:3]))
            else:
                pkgutil.resolve_name(name)
        except (ImportError, AttributeError, AssertionError):
            yield name


def lost(text: str, folder: Path) -> list[str]:
    text = re.sub(r"```diff\n.*?```", "", text, flags=re.DOTALL)  # of what is not there on purpose
    return [*lost_links(text, folder), *lost_paths(text), *lost_names(text)]


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page: Path) -> None:
    assert lost(page.read_text(), page.parent) == []


def test_the_look_for_what_is_not_there_finds() -> None:
    for wrong in (
        "[a page](nowhere.md)",
        "[a heading](README.md#nowhere)",
        "[its own](#nowhere)",
        "`tests/nowhere.py`",
        "`tests/test_docs.py::test_nowhere`",
        "python benchmarks/nowhere.py step",
        "tost_plugins.masks.nowhere",
        "`tost_plugins.adapters.nowhere`",
    ):
        assert len(lost(f"# Here\n\n{wrong}\n", ROOT)) == 1, wrong
    assert lost(
        "# Here\n[this](README.md#install) [that](#here) `tests/test_docs.py::test_docstring_examples`", ROOT
    ) == ["README.md#install"]


def test_every_page_is_in_the_index_and_the_front_pages_are_short() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert [page for page in pages if page != "README.md" and index.count(f"]({page})") != 1] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= 120


def test_the_map_is_that_of_the_package_and_every_stop_of_a_walk_is_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    said = {}
    for page in (ROOT / "tost_plugins").rglob("*/__init__.py"):
        doc = ast.get_docstring(ast.parse(page.read_text())) or ""
        room = page.parent.relative_to(ROOT / "tost_plugins").as_posix().replace("/", ".")
        said[room] = re.findall(r"May import: (.*)\.", doc)[0]
    assert dict(re.findall(r"^\| `([\w.]+)` \| [^|]* \| ([\w, .]+) \|$", text, re.MULTILINE)) == said
    stops = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", text, re.MULTILINE)
    assert len(stops) > 20
    assert [stop for stop in stops if stop[1] not in definitions((ROOT / stop[0]).read_text())] == []


def definitions(source: str) -> set[str]:
    """Functions, and methods as Class.method."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


# ---- a method of one's own


def added(diff: str) -> dict[str, str]:
    """Path -> text of the files that a diff which only adds lines changes, as they are after it."""
    found: dict[str, str] = {}
    for part in diff.split("diff --git ")[1:]:
        path = re.findall(r"^\+\+\+ b/(\S+)$", part, re.MULTILINE)[0]
        text = (ROOT / path).read_text() if "--- /dev/null" not in part else ""
        for hunk in re.split(r"^@@.*\n", part, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in signs) for signs in (" ", " +"))
            assert not before or text.count(before) == 1, f"{path} has changed around {before!r}: make the diff anew"
            text = text.replace(before, after, 1) if before else after
        found[path] = text
    return found


def test_the_method_in_extending_keeps_the_laws(tmp_path: Path) -> None:
    (diff,) = blocks("docs/extending.md", "diff")
    shutil.copytree(ROOT / "tost_plugins", tmp_path / "tost_plugins", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("tests/conftest.py", "tests/skips.py", "tests/mask_nets.py", "tests/masks/test_mask_methods.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    changed = added(diff)
    for path, text in changed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (new,) = [path for path in changed if not (ROOT / path).exists()]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = [new, "tests/masks/test_mask_methods.py", "--doctest-modules", "-k", f"registry or {Path(new).stem}"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 10
