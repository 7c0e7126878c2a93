"""A page for each mask and each tweak, from where it is said already: the class's fields and docstring, its row in
choosing.md, its rows and section in masks.md and tweaks.md."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tost_plugins.masks import MASKS
from tost_plugins.tweaks import TWEAKS, Tweak

DOCS = Path(__file__).parent
CLASSES = {cls.__name__: cls for cls in (*MASKS.values(), *TWEAKS.values())}
SHOWN = {"sparsity": "0.9", "path": "mask.safetensors"}
PARTS = ("Fields", "Paper", "Differs from the paper", "Example")


def parts(cls: type) -> dict[str, str]:
    """A docstring's named parts, lines joined but in its example; "" is what stands before the first."""
    split = re.split(rf"(?:^|(?<=\. ))({'|'.join(PARTS)}):\s", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    found = {"": split[0], **dict(zip(split[1::2], split[2::2], strict=True))}
    return {name: text if name == "Example" else joined(text) for name, text in found.items()}


def joined(text: str) -> str:
    """Paragraphs of one line each."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def said(cls: type) -> tuple[dict[str, str], str]:
    """What the docstring says of each field that it tells, and what follows on the last one: sentences about all."""
    text = parts(cls).get("Fields", "")
    names = "|".join(field_names(cls))
    starts = list(re.finditer(rf"(?:^|(?<=[;.] )|(?<=and )|(?<=`, ))`({names})`", text))
    ends = [*(found.start() for found in starts[1:]), len(text)][: len(starts)]
    told, told_last, rest = {}, "", ""
    for found, end in zip(reversed(starts), reversed(ends), strict=True):
        what = text[found.end() : end]
        if not rest and end == len(text):
            what, _, rest = what.partition(". ")
        what = re.sub(r"(^(,|:| is)? |[;,.]? ?(and)?[ ;,.]*$)", "", what) or told_last
        told[found[1]] = told_last = told.get(found[1]) or what
    return told, rest


def field_names(cls: Any) -> list[str]:
    """The fields that a recipe may set, a class's own in front of its bases'."""
    names = [field.name for field in dataclasses.fields(cls) if field.name != "kind"]
    return sorted(names, key=lambda name: name in Tweak.__dataclass_fields__)


def meaning(cls: type, name: str) -> str:
    """What a field is, by its own docstring, by that of a base, or by that of another kind which its own names."""
    named = [CLASSES[other] for other in re.findall(r"`(\w+)`", inspect.getdoc(cls) or "") if other in CLASSES]
    told = (said(where)[0].get(name) for where in (*cls.__mro__[:-1], *named) if where.__doc__)
    return next(filter(None, told), "")


def allowed(schema: dict[str, Any]) -> str:
    """A field's range as the JSON schema has it."""
    if "anyOf" in schema:
        return ", or ".join(allowed(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "examples" in schema:
        return "such as " + ", ".join(f"`{example}`" for example in schema["examples"])
    if schema.get("pattern"):
        return f"`{schema['pattern'].strip('^')}KIND`"
    kind = schema["type"]
    if kind == "array":
        inner = allowed(schema["items"] if "items" in schema else schema["prefixItems"][0])
        return f"{schema['maxItems']} of: {inner}" if "prefixItems" in schema else f"a list of: {inner}"
    if kind == "object":
        return f"a map from globs to: {allowed(schema['additionalProperties'])}"
    words = {
        "string": "text",
        "boolean": "`true` or `false`",
        "null": "`null`",
        "integer": "a whole number",
        "number": "a number",
    }
    ends = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "to below"}
    return ", ".join(
        filter(None, [words[kind], " ".join(f"{said} {schema[key]:,}" for key, said in ends.items() if key in schema)])
    )


def table(cls: Any) -> str:
    """The fields: name, default, range, meaning."""
    lines = ["| field | default | range | what it is |", "| --- | --- | --- | --- |"]
    schemas = TypeAdapter(cls).json_schema()["properties"]
    for name in field_names(cls):
        default = schemas[name].get("default", "needed")
        default = f"{default['value']:g}{default['unit']}" if isinstance(default, dict) else default  # a Time
        shown = default if default == "needed" else f"`{default if isinstance(default, str) else json.dumps(default)}`"
        cells = (f"`{name}`", shown, allowed(schemas[name]), meaning(cls, name))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def needed(cls: type) -> dict[str, str]:
    """The fields without a default, with a value to show."""
    return {name: shown for name, shown in SHOWN.items() if name in TypeAdapter(cls).json_schema().get("required", [])}


def rows(page: str, kind: str) -> list[dict[str, str]]:
    """The rows of a page's tables whose first cell is this kind, by column."""
    found, head = [], [""]
    for line in (DOCS / page).read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] == "`kind`":
            head = cells
        elif cells and cells[0] == f"`{kind}`":
            found.append(dict(zip(head, cells, strict=True)))
    return found


def detail(page: str, kind: str) -> str:
    """A page's section of this name, or its list entries that begin with it."""
    text = (DOCS / page).read_text("utf-8")
    section = re.search(rf"^## {kind}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^\* (?:`\w+`(?:,| and)? ?)*`\w+`:.*?(?=^\* |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    mine = [joined(entry) for entry in entries if f"`{kind}`" in entry.split(":")[0]]
    return from_inside(section[1].strip() if section else "\n".join(mine), page)


def from_inside(text: str, page: str) -> str:
    """Links of a page as they are from a folder beside it; what docstrings call docs/X.md becomes one."""
    text = re.sub(r"(?<!\]\()\bdocs/(\w+\.md)", r"[\1](\1)", text)
    return re.sub(r"\]\((?!http)([^)#\s]*)", lambda link: f"](../{link[1] or page}", text)


def card(kind: str) -> str:
    """The page of one kind."""
    cls, page = (MASKS[kind], "masks.md") if kind in MASKS else (TWEAKS[kind], "tweaks.md")
    told, (choice,) = parts(cls), rows("choosing.md", kind)
    short = {name: cell for row in rows(page, kind) for name, cell in row.items() if cell and name != "`kind`"}
    settings = ", ".join(["kind: " + kind, *(f"{name}: {value}" for name, value in needed(cls).items())])
    text = [
        f"# `{kind}`",
        told[""],
        "  \n".join(f"**{name.capitalize()}:** {cell}" for name, cell in short.items()),
        f"```yaml\nmask: {{{settings}}}\n```" if page == "masks.md" else f"```yaml\ntweaks:\n  - {{{settings}}}\n```",
        *(
            f"**{name.capitalize()}.** {cell[0].upper()}{cell[1:]}."
            for name, cell in choice.items()
            if name != "`kind`"
        ),
        "## Hyper-parameters",
        table(cls),
        said(cls)[1],
        "## Reference",
        *(f"**{name}.** {told[name][0].upper()}{told[name][1:]}" for name in ("Paper", "Differs from the paper")),
        f"**Class.** [`{cls.__name__}`][{cls.__module__}.{cls.__name__}]",
    ]
    example = f"## Example\n\n```pycon\n{inspect.cleandoc(told['Example'])}\n```"
    more = detail(page, kind)
    return "\n\n".join(
        [from_inside("\n\n".join(filter(None, text)), page), example, *(["## In detail", more] if more else [])]
    )
