"""The runs that stand beside a published table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError, unknown
from tost_plugins.lab import grid
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.reproduce.beside import beside, draw
from tost_plugins.lab.reproduce.protocols import PROTOCOLS, Protocol
from tost_plugins.lab.reproduce.tables import Table, published, table_of
from tost_plugins.lab.studies import registry as studies
from tost_plugins.lab.studies.base import Row, on_one_mask
from tost_plugins.lab.studies.settings import TOST
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.recipe.recipe import apply_changes, read

_RECIPE = "cifar10_random_90"  # the shipped ones differ in their masks only


def cells(
    name: str,
    protocol: str = "short",
    masks: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    changes: Sequence[str] = (),
    seeds: int = 3,
) -> list[grid.Cell]:
    """The runs of a table, seed after seed, so that a part of them is the table with fewer seeds.

    `masks` and `sparsities` (percent) keep those only; `changes` are `key.sub=value` of every recipe. Raises TostError
    for what the table does not have, and for what a recipe does not take.
    """
    table = table_of(name)
    if protocol not in PROTOCOLS:
        raise unknown("--protocol", "protocol", protocol, PROTOCOLS)
    how = PROTOCOLS[protocol]
    places = list(dict.fromkeys((row["mask"], row["sparsity"]) for row in published(name)))
    chosen = _chosen("--masks", "mask", name, masks, how.only_masks, [mask for mask, _ in places])
    known = [sparsity for _, sparsity in places]
    levels = _chosen("--sparsities", "sparsity", name, sparsities, how.only_sparsities, known)
    made: list[grid.Cell] = []
    for seed in grid.seed_range(seeds):
        for mask, sparsity in places:
            if mask in chosen and sparsity in levels:
                content = _content(table, how, mask, sparsity, changes)
                place = {"mask": mask, "sparsity": sparsity}
                made += on_one_mask(content, [seed], table.variants(content), place)
    return made


def run(
    name: str,
    out: str | Path,
    protocol: str = "short",
    masks: Sequence[str] = (),
    sparsities: Sequence[float] = (),
    changes: Sequence[str] = (),
    seeds: int = 3,
    jobs: int | grid.Cluster = 1,
    listen: Listener = silent,
    train: bool = True,
) -> dict[str, Any]:
    """Run a table in `out`: its cells, then NAME.csv, NAME.json and NAME.png there; returns what NAME.json holds.

    Cells that are finished are not run again, and one that was stopped goes on. Without `train` the table is of what is
    finished so far, also while another process runs the rest. Raises TostError where that is nothing.
    """
    out, made = Path(out), cells(name, protocol, masks, sparsities, changes, seeds)
    records = grid.run(made, out, jobs, listen=listen) if train else grid.finished(made, out)
    rows = beside(name, records)
    if not rows:
        raise TostError(
            f"--out {out}: expected finished runs with and without tweaks, got none; leave --finished away, or wait"
        )
    about, ours = table_of(name).about, f"{studies.title(records)}, protocol {protocol}"
    words = ["tost", "reproduce", name, "--protocol", protocol, "--seeds", str(seeds)]
    words += ["--masks", ",".join(masks)] if masks else []
    words += ["--sparsities", ",".join(f"{sparsity:g}" for sparsity in sparsities)] if sparsities else []
    result = {
        "about": f"ours beside {about}", "size": protocol, "title": ours, "summary": rows, "left": len(made) - len(records),
        "paper": f"{TOST}, {about}. {table_of(name).note}".strip(),
        "command": grid.command(words, changes, out),
    }  # fmt: skip
    return grid.leave(
        out, name, made, records, {name: rows}, lambda path: draw(name, records, rows, ours, path), result
    )


def plan(made: Sequence[grid.Cell], out: str | Path, jobs: int | grid.Cluster = 1) -> dict[str, Any]:
    """`grid.outlook`, with the number of `trainings` in all cells: a lottery ticket is one for each round."""
    tickets = [cell.recipe.mask.sparsities() for cell in made if isinstance(cell.recipe.mask, LotteryTicket)]
    return {**grid.outlook(made, out, jobs), "trainings": len(made) + sum(len(rounds) - 1 for rounds in tickets)}


def _chosen(where: str, what: str, name: str, given: Sequence[Any], usual: Sequence[Any], known: list[Any]) -> set[Any]:
    """Which of the published ones are run: those given, else the protocol's own as far as the table has them, else all."""
    for value in given:
        if value not in known:
            names = dict.fromkeys(f"{each:g}" if isinstance(each, (int, float)) else each for each in known)
            raise unknown(where, f"{what} of {name}", value, names)
    return set(given) or (set(usual) & set(known)) or set(known)


def _content(table: Table, how: Protocol, mask: str, sparsity: float, changes: Sequence[str]) -> Row:
    """The recipe's content with all its tweaks, for one place of a table."""
    content: Row = studies.content_of(table.study, how.size) if table.study else read(_RECIPE)
    for change in (table.recipe, how.changes):
        inner = {key: {**content.get(key, {}), **change[key]} for key in ("data", "optimizer") if key in change}
        content = {**content, **change, **inner}
    if how.tweaks is not None and table.study is None:
        content["tweaks"] = how.tweaks
    kind = mask if sparsity else "random"  # a dense network needs no ticket
    spec = {"kind": kind, "sparsity": sparsity / 100, "on_collapse": "keep_one", **how.masks.get(kind, {})}
    changed = apply_changes({**content, "mask": spec}, list(changes))
    if any(changed["mask"].get(key) != spec[key] for key in ("kind", "sparsity")):
        raise TostError(
            f"--set: expected changes of other keys than the mask's kind and sparsity, got {changed['mask']}; "
            f"use --masks and --sparsities"
        )
    return changed
