"""The tutorial and the how-tos run as they stand, and print what they say; each mask and tweak has its page."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT, run, says_so, wrong

from tost_plugins.masks import MASKS
from tost_plugins.tweaks import TWEAKS

PAGES = [ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/howto").glob("*.md"))]
PAGE = """
```python
# part.py
x = 2
```

```python
import sys

sys.path.insert(0, "")
from part import x

print(x)
```

```text
3
```

```sh
cat part.py | wc -l
```

```text
2
```

```python
print(f"≈ {x + 98} %")
```

```text
≈ 97 %
```
"""
HERE = {"torch", "tost_plugins", "train"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    for name in sorted(set(re.findall(r"^(?:from|import) (\w+)", page.read_text(), re.MULTILINE)) - HERE):
        pytest.importorskip(name)
    if page.stem == "tutorial":
        pytest.importorskip("onnxruntime")
    assert wrong(page, tmp_path) == []


def test_the_tutorial_s_pictures_are_there_as_it_makes_them() -> None:
    text = (ROOT / "docs/tutorial.md").read_text()
    shown = re.findall(r"\]\(tutorial/(\w+\.png)\)", text)
    assert shown == re.findall(r"savefig\(\"(\w+\.png)\"", text) and len(shown) == 2
    assert all(5_000 < (ROOT / "docs/tutorial" / name).stat().st_size < 100_000 for name in shown)


def test_the_runner_finds_what_a_page_says_wrong(tmp_path: Path) -> None:
    page = made(tmp_path / "page.md", PAGE)
    assert [ran.printed for ran in run(page, tmp_path)] == ["", "2\n", "2\n", "≈ 100 %\n"]
    (found,) = wrong(page, tmp_path)
    assert "prints\n2\nand the page says\n3" in found
    assert says_so("≈ 1,000 of 7\n", "≈ 1,040 of 7")
    assert not says_so("≈ 1,000 of 7\n", "≈ 1,060 of 7")
    assert not says_so("≈ 1,000 of 7\n", "≈ 1,000 of 8")
    with pytest.raises(AssertionError, match="no such file"):
        list(run(made(tmp_path / "sh.md", "```sh\nls nowhere 2>&1 | tr N n >&2; false\n```\n"), tmp_path))


def made(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- a page for each mask and tweak (docs/cards.py)


@pytest.fixture(scope="module")
def cards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cards", ROOT / "docs/cards.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", [*MASKS, *TWEAKS])
def test_each_kind_has_a_whole_page(kind: str, cards: ModuleType) -> None:
    cls = {**MASKS, **TWEAKS}[kind]
    assert len(cards.rows("choosing.md", kind)) == 1, f"give {kind} a row in docs/choosing.md"
    page = cards.card(kind)
    for field in cards.field_names(cls):
        assert cards.meaning(cls, field), (
            f"say what `{field}` is, in the `Fields:` of {cls.__name__} or where that points"
        )
        (row,) = re.findall(rf"^\| `{field}` \|.*\|$", page, re.MULTILINE)
        assert len(re.split(r"(?<!\\)\|", row)) == 6
    for part in ("When it pays", "Cost", "Does not fit", "Paper", "Differs from the paper"):
        assert re.search(rf"^\*\*{part}\.\*\* \S", page, re.MULTILINE), f"{cls.__name__}: {part}"
    for link in re.findall(r"\]\(\.\./(\w+\.md)", page):
        assert (ROOT / "docs" / link).exists()
    assert ">>>" in page


def test_a_page_s_parts_are_those_of_the_docstring(cards: ModuleType) -> None:
    told = cards.parts(MASKS["snip"])
    assert told[""].startswith("Keep the weights with the largest |g * w|") and told["Paper"].startswith("Lee et al.")
    assert (
        cards.meaning(MASKS["snip"], "batches") == "how many batches to look at, 1 or more, fewer where the loader ends"
    )
    assert cards.meaning(MASKS["rigl"], "every") == "the time between updates"  # as in `Set`
    assert cards.meaning(TWEAKS["sharpness"], "optional").startswith("whether")  # its base's
    assert cards.allowed({"type": "number", "minimum": 0, "exclusiveMaximum": 1}) == "a number, from 0 to below 1"
