"""A folder of studies as one HTML page that needs nothing else: figures and tables are inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5a5a5a; --line: #d9d9d9; --paper: #ffffff; --band: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #a8a8a8; --line: #3c3c3c; --paper: #161616; --band: #222222; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 0 0 .25rem; }
nav ul { columns: 15rem; padding-left: 1.2rem; margin: 1rem 0 0; }
a { color: inherit; } p { margin: .35rem 0; } .soft { color: var(--soft); }
section { border-top: 1px solid var(--line); padding-top: 1.5rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; overflow-x: auto; } /* on a narrow screen a figure scrolls, since its text would be too small */
img { display: block; max-width: 100%; min-width: 34rem; height: auto; margin: 0 auto; background: #ffffff;
      border-radius: 4px; }
.wide { overflow-x: auto; max-height: 30rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--band); position: sticky; top: 0; } .text { text-align: left; }
code { display: block; overflow-x: auto; padding: .6rem .8rem; background: var(--band); border-radius: 4px;
       font-size: .85rem; white-space: pre; }
summary { cursor: pointer; margin: .75rem 0; }
"""


def page(folder: str | Path, target: str | Path) -> dict[str, Any]:
    """Write the page of all studies in `folder` and the folders below it; returns its path and how many there are.

    Each study has its figure, its table of means, what the paper says, and the command that made it. Raises TostError
    where there is no study.
    """
    folder, target = Path(folder), Path(target)
    found = [(path, result) for path in sorted(folder.rglob("*.json")) if (result := _study(path)) is not None]
    if not found:
        raise TostError(f"tost study report: expected a folder with studies, got none in {folder}; run some, like "
                        f"tost study pswish --out {folder}/pswish")  # fmt: skip
    links = "".join(f'<li><a href="#study-{n}">{escape(_name(r))}</a></li>' for n, (_, r) in enumerate(found))
    sections = "".join(_section(number, path, result) for number, (path, result) in enumerate(found))
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>Studies of sparse networks</title><style>{_STYLE}</style></head><body><header>'
        f'<h1>Studies of sparse networks</h1><p class="soft">{_machines([r for _, r in found])}</p><nav aria-label="Studies">'
        f"<ul>{links}</ul></nav></header><main>{sections}</main></body></html>\n"
    )
    write(target, text)
    return {"page": str(target), "studies": len(found)}


def _study(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    known = isinstance(content, dict) and {"study", "summary", "command"} <= content.keys()
    return content if known and path.with_suffix(".png").exists() else None


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['study']} ({result['size']})"


def _machines(results: Sequence[Mapping[str, Any]]) -> str:
    """The versions behind the results, each combination once."""
    names = ("tost_plugins", "torch", "python")
    lines = (", ".join(f"{n} {r['environment'][n]}" for n in names if n in r["environment"]) for r in results)
    return escape("; ".join(dict.fromkeys(lines)))


def _section(number: int, path: Path, result: Mapping[str, Any]) -> str:
    image = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
    about = f"{result['study']}: {result['about']}"
    sentence = escape(f"{result['about'][0].upper()}{result['about'][1:]}.")
    runs = (
        f"{result['title']}; {result['seconds'] / 60:.1f} minutes in all" if result["title"] else "nothing is trained"
    )
    return (
        f'<section id="study-{number}"><h2>{escape(_name(result))}</h2><p>{sentence}</p>'
        f'<p class="soft">{escape(runs)}</p>'
        f'<figure><img src="data:image/png;base64,{image}" alt="{escape(about, quote=True)}"></figure>'
        f"<p>The paper: {escape(result['paper'])}</p><details><summary>Table of means</summary>{_table(result['summary'])}"
        f"</details><code>{escape(result['command'])}</code></section>"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) > 400:
        return f'<p class="soft">{len(rows)} rows: see the CSV file.</p>'
    head = "".join(f"<th{_side(value)}>{escape(key.replace('_', ' '))}</th>" for key, value in rows[0].items())
    body = "".join("<tr>" + "".join(f"<td{_side(v)}>{_shown(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _side(value: Any) -> str:
    return ' class="text"' if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
