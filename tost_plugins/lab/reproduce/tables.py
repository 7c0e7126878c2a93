"""The tables of the paper, and their published numbers."""

from __future__ import annotations

import csv
import importlib.resources
from dataclasses import dataclass

from tost_plugins.errors import unknown
from tost_plugins.lab.studies.base import Content, Row, alone
from tost_plugins.lab.studies.settings import GHOSTS


@dataclass(frozen=True)
class Table:
    """A table of the paper, or one block of it: whose published numbers they are, and what of ours stands beside them.

    `recipe` has our network and data at the full protocol, in place of those of the shipped recipe, or of a `study` that
    looks at the same. Beside plain training there is each tweak of these `kinds` (None: of all) alone, and all `together`.
    """

    number: int
    model: str
    dataset: str
    recipe: Row
    kinds: tuple[str, ...] | None = ()
    together: bool = True
    study: str | None = None
    note: str = ""

    @property
    def about(self) -> str:
        """What is published, in words."""
        model = f"{self.model} (table body)" if self.note == _WHICH else self.model
        return f"table {self.number}, {model} on {self.dataset}"

    def variants(self, content: Content) -> dict[str, Row]:
        """The trainings on each mask, the plain one first, as changes of the recipe."""
        return alone(content, self.kinds) | ({"tost": {}} if self.together else {})


_WIDE = "The published ResNet-32 is the one of doubled widths (32-64-128), as ours."
_WHICH = "The table's body says ResNet-50, its caption ResNet-18; ours is cifar/resnet18."
_CIFAR100 = {"data": {"name": "cifar100"}}
_RESNET18 = {"model": "cifar/resnet18", **_CIFAR100}
TABLES: dict[str, Table] = {
    "table2": Table(2, "ResNet-32", "CIFAR-10", {}, note=_WIDE),
    "table2-cifar100": Table(2, "ResNet-32", "CIFAR-100", _CIFAR100, note=_WIDE),
    "table2-resnet50": Table(2, "ResNet-50", "CIFAR-10", {"model": "cifar/resnet18"}, note=_WHICH),
    "table2-resnet50-cifar100": Table(2, "ResNet-50", "CIFAR-100", _RESNET18, note=_WHICH),
    "table3": Table(
        3, "ResNet-50", "TinyImageNet",
        {"model": "torchvision/resnet50", "data": {"name": "folder", "image_size": 64}},
        note="The images are a folder of yours: --set data.path=FOLDER.",
    ),
    "table4": Table(4, "ResNet-18", "CIFAR-100", _RESNET18, None, study="ablation"),
    "table5": Table(
        5, "ResNet-18", "CIFAR-100", _RESNET18, GHOSTS, together=False, study="density-benefit",
        note="Published are gains only. At 0 % ours is dense training, without a ticket.",
    ),
}  # fmt: skip


def published(name: str) -> list[Row]:
    """The published numbers of a table: a row for each mask, sparsity (percent) and training other than the plain one.

    `plain` and `with_tweaks` are accuracies in percent (None in table 5, which has gains only), `difference` their
    difference in points.

    Example:
        >>> published("table2")[0]["difference"]
        1.58
    """
    table = table_of(name)
    if table.number == 5:
        return _published_gains()
    accuracy = {
        (row["mask"], row["sparsity_percent"], row["training"]): float(row["accuracy_percent"])
        for row in _shipped("tost_accuracy.csv")
        if (int(row["table"]), row["model"], row["dataset"]) == (table.number, table.model, table.dataset)
    }
    rows = []
    for (mask, sparsity, training), value in accuracy.items():
        if training != "plain":
            plain = accuracy[mask, sparsity, "plain"]
            numbers = {"plain": plain, "with_tweaks": value, "difference": round(value - plain, 2)}
            rows.append({"mask": mask, "sparsity": int(sparsity), "training": training, **numbers})
    return rows


def _published_gains() -> list[Row]:
    rows = []
    for row in (row for row in _shipped("tost_other.csv") if row["table"] == "5"):
        training = row["quantity"].removeprefix("gain of ").removesuffix(" (points)")
        for sparsity, gain in zip(row["column"].split("|"), row["value"].split("|"), strict=True):
            numbers = {"plain": None, "with_tweaks": None, "difference": float(gain)}
            where = {"mask": "lottery_ticket", "sparsity": int(sparsity.removesuffix(" %")), "training": training}
            rows.append({**where, **numbers})
    return rows


def table_of(name: str) -> Table:
    """The table of this name; raises TostError for an unknown one."""
    if name not in TABLES:
        raise unknown("tost reproduce", "table", name, TABLES)
    return TABLES[name]


def _shipped(name: str) -> list[dict[str, str]]:
    """The rows of one of the files with published numbers."""
    file = importlib.resources.files("tost_plugins.lab.reproduce") / "published" / name
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
