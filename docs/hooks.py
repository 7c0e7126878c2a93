"""What mkdocs is told beyond docs/*.md: the navigation, which is docs/README.md's list; the front page; a page for each mask
and tweak (cards.py); the reference. All of it is made from what stands elsewhere, so that nothing is said twice."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cards
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tost_plugins

ROOT = Path(__file__).resolve().parent.parent
CARDS = {"masks.md": ("masks", cards.MASKS), "tweaks.md": ("tweaks", cards.TWEAKS)}
#: Files at the top that are pages (or at least files) of the site: name there, and name here.
TOP = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "LICENSE": "LICENSE",
}


def package() -> None:
    """Lay the package out as it is installed, `adapters` inside: the reference is read from there (see mkdocs.yml)."""
    folder = ROOT / "build" / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tost_plugins", folder / "tost_plugins")
    shutil.copytree(ROOT / "adapters", folder / "tost_plugins" / "adapters")


package()  # now, not in `on_config`: mkdocstrings looks for the folder before that


def rooms() -> dict[str, list[str]]:
    """Room -> those of its modules that have something public in them, dotted."""
    found: dict[str, list[str]] = {}
    for home, first in ((ROOT / "tost_plugins", ()), (ROOT / "adapters", ("adapters",))):
        for path in sorted(home.rglob("*.py")):
            names = [getattr(node, "name", "_") for node in ast.parse(path.read_text("utf-8")).body]
            if path.stem not in ("__init__", "__main__") and not all(name.startswith("_") for name in names):
                folder = (*first, *path.parent.relative_to(home).parts)
                found.setdefault(".".join(folder) or path.stem, []).append(
                    ".".join(("tost_plugins", *folder, path.stem))
                )
    return dict(sorted(found.items()))


def reference() -> Iterator[tuple[str, str]]:
    """The reference's pages: the names at the front door, and each room's modules."""
    doors = [f"* [`{name}`][tost_plugins.{home}.{name}]" for name, home in tost_plugins._HOME.items()]
    doors += ["* `masks`: `masks.find`, `masks.live`, `masks.soft` and more: [masks](masks.md)"]
    found = rooms()
    listed = [f"* [{room}]({room}.md)" for room in found]
    text = ["# Reference", "`import tost_plugins` has", "\n".join(doors)]
    text += ["All that is public, room by room as in [the map](../architecture.md):", "\n".join(listed)]
    yield "reference/README.md", "\n\n".join(text)
    for room, modules in found.items():
        about = f"::: tost_plugins.{room}\n    options: {{show_root_heading: false, members: false}}"
        entries = [f"::: {module}" for module in modules]
        yield f"reference/{room}.md", "\n\n".join([f"# {room}", *([about] if room != "errors" else []), *entries])


def title(name: str, page: str) -> str:
    """What the navigation calls a page: as the list does, or, where that has the file's name, the first words of its heading."""
    heading = re.findall(r"^# (.*)", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)[0]
    return heading.partition(":")[0] if name == page else name


def navigation() -> Iterator[dict[str, Any]]:
    """docs/README.md's groups, with the cards under the page they belong to; then the reference."""
    for group in re.split(r"^## ", (ROOT / "docs" / "README.md").read_text("utf-8"), flags=re.MULTILINE)[1:]:
        pages: list[Any] = []
        for name, page in re.findall(r"^\* \[([^]]+)\]\(([^)]+)\)", group, re.MULTILINE):
            folder, kinds = CARDS.get(page, ("", {}))
            under = [{kind: f"{folder}/{kind}.md"} for kind in kinds]
            pages.append({title(name, page): [{"Overview": page}, *under] if under else page})
        yield {group.splitlines()[0]: pages}
    yield {
        "Reference": [
            "reference/README.md",
            *({room: f"reference/{room}.md"} for room in rooms()),
        ]
    }


def on_config(config: MkDocsConfig) -> None:
    """mkdocs calls this once, with mkdocs.yml read."""
    *groups, inside, last = navigation()
    inside["Inside"] += [TOP["CONTRIBUTING.md"], TOP["CHANGELOG.md"]]
    start = groups[0].pop("Start")
    config.nav = [{"Start": [{"tost_plugins": "README.md"}, *start]}, *groups[1:], inside, last]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """And this when it has looked through docs/."""
    made = {f"{folder}/{kind}.md": cards.card(kind) for folder, kinds in CARDS.values() for kind in kinds}
    made |= {here: inside((ROOT / there).read_text("utf-8")) for there, here in TOP.items()} | dict(reference())
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))


def inside(text: str) -> str:
    """A text from the top, with its links as they are from docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\((\w+\.?\w*)\)", lambda link: f"]({TOP.get(link[1], link[1])})", text)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """And this for each page: the front page is README.md, the list of pages behind it; links out of docs/ lead inside, or name
    what is only in the repository."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri == "README.md":
        markdown = inside((ROOT / "README.md").read_text("utf-8")) + markdown.replace("# ", "## ").replace(
            "## #", "###"
        )
    markdown = re.sub(rf"\[[^]]*\]\({up}\.\./([^)#]+)\)", in_the_repository, markdown)
    return re.sub(rf"\]\({up}\.\./(\w+\.?\w*)", lambda link: f"]({up}{TOP.get(link[1], link[1])}", markdown)


def in_the_repository(link: re.Match[str]) -> str:
    """A file that is no page by its path, since the site does not say where its repository lies; other links as they are."""
    return f"`{link[1]}`" if (ROOT / link[1]).is_file() and link[1] not in (*TOP, "README.md") else link[0]


def on_post_page(output: str, page: Page, **_: object) -> None:
    """And this with each page's HTML, which is to load nothing from elsewhere."""
    if found := re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*", output):
        raise PluginError(f"{page.file.src_uri}: expected a page that loads nothing from elsewhere, got {found[0]}")
