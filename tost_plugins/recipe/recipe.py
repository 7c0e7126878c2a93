"""Recipe: everything that defines a sparse run, strict, to and from YAML."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from tost_plugins.errors import TostError, from_pydantic, shown, unknown
from tost_plugins.files.atomic import write
from tost_plugins.masks import MASKS, Mask
from tost_plugins.masks.base import Moving
from tost_plugins.recipe import plain_yaml
from tost_plugins.session.norms_alone import Train
from tost_plugins.session.session import Session
from tost_plugins.session.watch.watch import Watch, WatchField
from tost_plugins.training.by_hand import names
from tost_plugins.training.clock import Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.tweaks import TWEAKS

DEFAULT = "tost_any_mask"


def _by_kind(what: str, registry: Mapping[str, type]) -> BeforeValidator:
    """A string is a kind with its defaults; an unknown kind is worded with the nearest one."""

    def check(value: Any) -> Any:
        value = {"kind": value} if isinstance(value, str) else value
        if isinstance(value, Mapping):
            if "kind" not in value:
                keys = ", ".join(map(str, value)) or "none"
                raise ValueError(f"expected a key 'kind', got the keys {keys}; known: {', '.join(sorted(registry))}")
            if not isinstance(value["kind"], str) or value["kind"] not in registry:
                raise ValueError(str(unknown("kind", what, value["kind"], registry)))
        return value

    return BeforeValidator(check)


MaskField = Annotated[
    Annotated[reduce(or_, MASKS.values()), Field(discriminator="kind")],  # type: ignore[valid-type]
    _by_kind("mask method", MASKS),
]
TweakField = Annotated[
    Annotated[reduce(or_, TWEAKS.values()), Field(discriminator="kind")],  # type: ignore[valid-type]
    _by_kind("tweak", TWEAKS),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Strict):
    """What to train on. `limit` uses that many training images, `validation` holds that many out (of the rest)."""

    name: Literal["digits", "cifar10", "cifar100", "folder"] = "digits"
    path: Annotated[str, Field(max_length=4096)] | None = None
    limit: Annotated[int, Field(ge=1), NUMBER] | None = None
    validation: Annotated[int, Field(ge=0), NUMBER] = 0
    batch_size: Annotated[int, Field(ge=1, le=1_000_000), NUMBER] = 128
    augment: bool = True
    image_size: Annotated[int, Field(ge=1, le=4096), NUMBER] | None = None


class OptimizerSpec(_Strict):
    """How to step: SGD with momentum, or AdamW (which ignores momentum and nesterov)."""

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER] = 2e-4


class ScheduleSpec(_Strict):
    """The learning rate: times `factor` at each of `at` (steps), half a cosine to 0 (cosine), or constant; before it a
    linear `warmup`."""

    kind: Literal["steps", "cosine", "constant"] = "cosine"
    at: tuple[TimeField, ...] = ()
    factor: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.1
    warmup: TimeField = Time(0, "ba")


#: What is known below a key of a recipe, and in a kind of mask or tweak.
_SPECS: dict[str, type[BaseModel]] = {
    "data": DataSpec,
    "optimizer": OptimizerSpec,
    "schedule": ScheduleSpec,
    "watch": Watch,
}
_KEYS: dict[str, Iterable[str]] = {key: spec.model_fields for key, spec in _SPECS.items()}
_KEYS |= {kind: names(settings) for kind, settings in (MASKS | TWEAKS).items()}


class Recipe(_Strict):
    """A sparse run: a mask, tweaks and a seed; for `tost train` also model, data, optimizer, schedule and duration.

    Unknown keys are errors at every level, times carry a unit (`0.4dur`, `60ep`, `500ba`).

    Example:
        >>> recipe = Recipe.from_dict({"mask": {"kind": "snip", "sparsity": 0.9}, "tweaks": ["ghost_skip"]})
        >>> recipe.mask.sparsity, recipe.tweaks[0].kind
        (0.9, 'ghost_skip')
    """

    name: Annotated[str, Field(max_length=200)] = "unnamed"
    source: Annotated[str, Field(max_length=2000)] = ""
    seed: Annotated[int, Field(ge=0, lt=2**32), NUMBER] = 0  # what numpy, and so every trainer, takes
    mask: MaskField  # type: ignore[valid-type]
    tweaks: tuple[TweakField, ...] = ()  # type: ignore[valid-type]
    compact: bool = False
    train: Train = "all"
    watch: WatchField = None
    model: Annotated[str, Field(max_length=200)] = "cifar/resnet20"
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    duration: TimeField = Time(10, "ep")
    trainer: Literal["composer", "transformers", "accelerate", "lightning", "torch"] = "torch"
    precision: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str | None = None) -> Recipe:
        """Check and build; raises TostError that names the key, the value and the remedy."""
        if not isinstance(content, Mapping):
            raise TostError(f"{where or 'recipe'}: expected keys and values, got {content!r}; see tost recipes show")
        name = content.get("name")
        where = where or f"recipe {name if isinstance(name, str) else 'unnamed'}"
        try:
            recipe = cls.model_validate(dict(content))
        except ValidationError as error:
            raise from_pydantic(where, error, {*MASKS, *TWEAKS}, _KEYS | {"": cls.model_fields}) from None
        kinds = [tweak.kind for tweak in recipe.tweaks]
        twice = sorted(kind for kind, count in Counter(kinds).items() if count > 1)
        if twice:
            raise TostError(f"{where}: tweaks: expected each kind once, got {twice[0]!r} twice; merge the two entries")
        if recipe.train == "norms" and isinstance(recipe.mask, Moving):
            raise TostError(
                f"{where}: train: expected all beside a mask that moves with its weights, got 'norms' and {recipe.mask.kind}; "
                f"use a mask that stands still"
            )
        if recipe.duration.unit == "dur":
            raise TostError(
                f"{where}: duration: expected epochs or steps, got {str(recipe.duration)!r}; write '182ep' or '5000ba'"
            )
        return recipe

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A shipped recipe by name, or a YAML file by path; raises TostError if neither exists, and where the file, which may
        come from somebody else, has what it watches written outside the folder that it is run in."""
        recipe = cls.from_dict(read(name_or_path), f"recipe {name_or_path}")
        place = Path(recipe.watch.out or "") if recipe.watch is not None else Path()
        if place.is_absolute() or ".." in place.parts:
            raise TostError(
                f"recipe {name_or_path}: watch.out: expected a folder below this one, got {str(place)!r}; leave it away, or "
                f"give watch= as an argument"
            )
        return recipe

    @classmethod
    def of(cls, value: Recipe | Mapping[str, Any] | str | Path | None, **overrides: Any) -> Recipe:
        """Whatever a user may give (None is the default recipe), with the overrides `mask` (a kind, a mask file's path or a
        dict), `sparsity`, `tweaks` (kinds or dicts), `seed`, `compact`, `train`, `watch` (measures, or a dict) applied."""
        known = ("mask", "sparsity", "tweaks", "seed", "compact", "train", "watch")
        for name in overrides:
            if name not in known:
                raise unknown("overrides", "override", name, known)
        given = {name: value for name, value in overrides.items() if value is not None}
        if isinstance(value, Recipe) and not given:
            return value
        if value is not None and not isinstance(value, (Recipe, Mapping, str, Path)):
            raise TostError(
                f"recipe: expected a Recipe, a dict, a path or a shipped name, got {shown(value)}; see tost recipes list"
            )
        content = value.to_dict() if isinstance(value, Recipe) else value
        content = dict(content) if isinstance(content, Mapping) else read(content or DEFAULT)
        if "mask" in given:
            content["mask"] = _as_mask(given["mask"], given.get("sparsity"))
        elif "sparsity" in given:
            content["mask"] = {**_as_mask(content.get("mask")), "sparsity": given["sparsity"]}
        content |= {name: given[name] for name in ("tweaks", "seed", "compact", "train", "watch") if name in given}
        return cls.from_dict(content)

    def build(self, model: nn.Module) -> Session:
        """A session for this model, not yet attached."""
        return Session(model, self)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only; `Recipe.from_dict` reads them back to an equal recipe."""
        return json.loads(self.model_dump_json())

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML text, written to `path` if given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        if path is not None:
            write(Path(path), text)
        return text


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the library."""
    folder = Path(str(importlib.resources.files("tost_plugins.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read(name_or_path: str | Path) -> dict[str, Any]:
    """The unchecked content of a shipped recipe or a YAML file, by whose name it is called where it has none of its own; raises
    TostError if it is not readable YAML."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TostError(f"recipe: expected a path or a shipped name, got {shown(name_or_path)}; see tost recipes list")
    path = Path(name_or_path)
    if not os.path.isfile(path):
        files = shipped()
        if str(name_or_path) not in files:
            if path.suffix in (".yaml", ".yml"):
                raise TostError(f"recipe: expected an existing file, got {str(path)!r}; check the path")
            raise unknown("recipe", "recipe name or file", str(name_or_path), files)
        path = files[str(name_or_path)]
    try:
        with path.open(encoding="utf-8") as file:
            content = plain_yaml.parse(file.read(plain_yaml.LONGEST + 1))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise TostError(f"recipe {path}: expected YAML, got something unreadable ({error}); correct the file") from None
    if not isinstance(content, dict):
        raise TostError(f"recipe {path}: expected keys and values, got {type(content).__name__}; see tost recipes show")
    return {"name": path.stem[:200], **content}


def apply_changes(content: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
    """A recipe's content with `key.sub=value` changes; values are read as YAML, list items are reached by number.

    Example:
        >>> apply_changes({"mask": {"kind": "snip"}}, ["mask.sparsity=0.9"])
        {'mask': {'kind': 'snip', 'sparsity': 0.9}}
    """
    made = copy.deepcopy(dict(content))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise TostError(f"--set: expected KEY=VALUE, got {change!r}; write it like mask.sparsity=0.95")
        *parents, last = key.split(".")
        place: Any = made
        try:
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
            place[int(last) if isinstance(place, list) else last] = plain_yaml.parse(value)
        except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise TostError(
                f"--set: expected a key of the recipe, got {change!r} ({error}); see tost recipes show"
            ) from None
    return made


def _as_mask(value: Any, sparsity: float | None = None) -> dict[str, Any]:
    if isinstance(value, (str, Path)):
        is_kind = str(value) in MASKS
        looks_like_file = Path(value).suffix or os.path.exists(value)
        value = {"kind": "file", "path": str(value)} if not is_kind and looks_like_file else {"kind": str(value)}
    elif not isinstance(value, Mapping) or isinstance(value, Mask):
        raise TostError(f"mask: expected a kind, a path or a dict, got {value!r}; see tost recipes schema")
    return {**value, "sparsity": sparsity} if sparsity is not None else dict(value)
