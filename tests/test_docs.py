"""What README, docs and docstrings show runs, and names what there is."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import yaml
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


def test_the_readme_loop_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(recipe.replace("rescaled_init}", "rescaled_init, iterations: 1}"))
    loop = next(block for block in blocks("README.md") if "session.drive" in block).replace("...", "train_loader")
    loop = loop.replace("total_steps=epochs * len(train_loader)", "total_steps=4")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip
    keys = list(model.state_dict())
    data = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(4)]
    exec(loop, {"torch": torch, "model": model, "train_loader": data})
    kept = sum(int(model[i].weight.count_nonzero()) for i in (0, 3, 7))
    assert kept <= round(0.02 * sum(model[i].weight.numel() for i in (0, 3, 7)))
    assert list(model.state_dict()) == keys


def test_the_studies_page_runs_and_names_every_study() -> None:
    pytest.importorskip("scipy")
    for block in blocks("docs/studies/README.md"):
        exec(block, {})
    (watch,) = blocks("docs/studies/README.md", "yaml")
    assert len(Recipe.of("tost_any_mask", **yaml.safe_load(watch)).watch.measures) == 4
    assert all(f"| `{name}` |" in (ROOT / "docs/studies/README.md").read_text() for name in STUDIES)


def test_the_pages_name_every_method_and_tweak() -> None:
    assert all(f"`{kind}`" in (ROOT / "docs/masks.md").read_text() for kind in MASKS)
    assert all(f"## {kind}" in (ROOT / "docs/tweaks.md").read_text() for kind in TWEAKS)


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
