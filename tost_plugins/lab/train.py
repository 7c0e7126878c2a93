"""`tost train`: from a recipe to a finished sparse network on disk, under any of the five trainers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tost_plugins import masks
from tost_plugins.errors import TostError
from tost_plugins.files.atomic import read_json, write, write_csv
from tost_plugins.files.tensors import write_tensors
from tost_plugins.lab import data, models
from tost_plugins.lab.job import Job
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.masks.connected import connects, followed
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity
from tost_plugins.recipe.recipe import Recipe, read
from tost_plugins.session.session import Session
from tost_plugins.training import ranks
from tost_plugins.training.clock import Clock
from tost_plugins.training.optional import package
from tost_plugins.training.params import prunable, some
from tost_plugins.training.task import Task

_PACKAGES = (
    "tost_plugins",
    "torch",
    "torchvision",
    "mosaicml",
    "transformers",
    "accelerate",
    "lightning",
    "datasets",
    "timm",
)


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    mask: Mask | None = None,
    listen: Listener = silent,
    keep_at: int = 0,
    initial: Callable[[nn.Module, Mask | None], None] | None = None,
) -> dict[str, Any]:
    """Train as the recipe says and leave everything in `out`: recipe, versions, history, mask, the plain network.

    Returns what `result.json` holds: test accuracy in percent, sparsity, parameter counts, the rows of the history.
    `mask` is used instead of the recipe's; `keep_at` is a step whose checkpoint stays in `out`/early; `initial(model,
    mask)` may change the initial weights. A stopped run goes on with `resume`, a finished one is returned as it is.
    Raises TostError for anything in the recipe that does not work out, Stopped after Ctrl-C.
    """
    out = Path(out)
    check_out(out, recipe, resume)
    if (out / "result.json").exists():
        return read_json(out / "result.json")
    job = prepare(_watched(recipe, out), out, mask, listen)
    job.keep_at = keep_at
    if initial is not None:
        initial(job.model, mask)
    out.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(out / "recipe.yaml")
    write(out / "environment.json", json.dumps(environment(), indent=1))
    described = {"name": recipe.name, "model": recipe.model, "data": recipe.data.name, "trainer": recipe.trainer}
    job.listen("run", {**described, "total": job.total_steps})
    run = package(f"tost_plugins.lab.loops.{recipe.trainer}", "trainer", f"tost_plugins[{recipe.trainer}]").run
    with _stoppable(job):
        session: Session = run(job, resume)
    return _conclude(job, session)


def prepare(recipe: Recipe, out: Path, mask: Mask | None = None, listen: Listener = silent) -> Job:
    """Data, model (seeded) and loader of a run; nothing is written yet."""
    if ranks.world() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TostError("tost train: expected one process, got several; for several, use an adapter in your own script")
    loaded = data.load(recipe.data)
    torch.manual_seed(recipe.seed)
    channels = loaded.train.images.shape[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build(recipe.model, loaded.classes, channels).to(device)
    if recipe.trainer == "torch":  # the others move batches themselves
        loaded = loaded.to(device)
    loader = data.Loader(
        loaded.train, recipe.data.batch_size, seed=recipe.seed, shuffle=True, augment=loaded.augment,
        mean=loaded.mean, std=loaded.std,
    )  # fmt: skip
    total = recipe.duration.steps(Clock(steps_per_epoch=len(loader)))
    if total < 1:
        raise TostError(f"duration: expected at least one optimizer step, got {str(recipe.duration)!r}; make it longer")
    return Job(recipe, out, loaded, model, loader, total, device, mask, listen)


def _watched(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with a place for what is watched, `watch` in the run's folder unless it names another one in there: a
    recipe may come from somebody else, and writes nowhere else."""
    if recipe.watch is None:
        return recipe
    place = Path(recipe.watch.out) if recipe.watch.out is not None else out / "watch"
    if not place.resolve().is_relative_to(out.resolve()):
        raise TostError(f"watch.out: expected a folder within the run's, {out}, got {str(place)!r}; leave `out` away")
    return recipe.model_copy(update={"watch": recipe.watch.model_copy(update={"out": str(place)})})


def find_mask(recipe: Recipe) -> Mask:
    """The mask that training this recipe would start with, found in the same way, without training."""
    job = prepare(recipe, Path())
    ignore = recipe.mask.ignore
    return masks.run(recipe.mask, Task.of(job.model, ignore, batches=job.loader, loss_fn=F.cross_entropy), recipe.seed)


def environment() -> dict[str, str]:
    """Versions of what a result depends on, and the machine's kind."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


#: What a folder holds before the first step.
_BEFORE = {"recipe.yaml", "environment.json", "lock"}


def check_out(out: Path, recipe: Recipe, resume: bool) -> None:
    """Raise TostError unless the folder is new, as is one whose run was refused before its first step, or holds a run of this
    very recipe that is to be resumed."""
    if not (out / "recipe.yaml").exists() or {path.name for path in out.iterdir()} <= _BEFORE:
        return
    if not resume:
        raise TostError(
            f"--out {out}: expected a new folder, got one that holds a run; add --resume to go on with it, "
            f"or choose another folder"
        )
    kept = Recipe.from_dict(read(out / "recipe.yaml"), f"recipe {out / 'recipe.yaml'}")
    before, now = (dict(_leaves(spec.to_dict())) for spec in (kept, recipe))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in ("name", "source")]
    if keys:
        differ = some([f"{key} {now.get(key)!r}, there {before.get(key)!r}" for key in keys])
        reason = "; no trainer reads another's checkpoints" if "trainer" in keys else ""
        raise TostError(
            f"--resume: expected the recipe that {out} was started with, got another one ({differ}){reason}; "
            f"use {out / 'recipe.yaml'}, or choose another folder"
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a recipe by their dotted keys, as `--set` has them."""
    if not isinstance(value, (dict, list)) or not value:
        yield key, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _conclude(job: Job, session: Session) -> dict[str, Any]:
    """Check the promises, then save the network and what it is worth."""
    weights = prunable(job.model, job.recipe.mask.ignore)
    mask = session.mask
    for name, keep in mask.items():
        if bool((weights[name].detach().cpu()[~keep] != 0).any()):
            raise TostError(f"{name}: expected zeros outside the mask, got others; please report this as a bug")
    if session.moving is not None:
        write_csv(job.out / "movement.csv", _movement(job.history))
    write_tensors(job.out / "model.safetensors", job.model.state_dict())
    report = session.report(rows=False)
    task = Task.of(job.model, job.recipe.mask.ignore, batches=job.loader)
    found = connects(mask, followed(task))  # the session has not followed a run of which nothing was left to train
    live = None if found is None else found.live.kept
    _described(mask, job, session, found).save(job.out / "mask.safetensors")
    recipe, accuracy = job.recipe, job.evaluate(job.model, job.data.test)["accuracy"]
    result = {
        "name": recipe.name, "model": recipe.model, "trainer": recipe.trainer, "mask": recipe.mask.kind,
        "tweaks": [tweak.kind for tweak in session.tweaks], "left_out": session.left_out, "seed": recipe.seed,
        "test_accuracy": accuracy, "sparsity": report.sparsity,
        "live": live, "effective_sparsity": None if live is None else 1 - live / mask.size,
        "active_parameters": report.active_parameters, "total_parameters": report.total_parameters,
        "history": job.history, "curves": job.curves,
    }  # fmt: skip
    write(job.out / "result.json", json.dumps(result, indent=1))
    return result


def _described(mask: Mask, job: Job, session: Session, found: Connectivity | None) -> Mask:
    """The mask with what its card says of the run: network, data, training, what is live, versions."""
    recipe = job.recipe
    data = recipe.data.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
    training = {
        "trainer": recipe.trainer,
        "duration": str(recipe.duration),
        "tweaks": [tweak.kind for tweak in session.tweaks],
    }
    live = {} if found is None else {"live": {name: int(kept.sum()) for name, kept in found.live.items()}}
    packages = {name: version for name, version in environment().items() if name != "platform"}
    about = {
        "recipe": recipe.name,
        "model": recipe.model,
        "data": {"name": recipe.data.name, **data},
        "training": training,
    }
    return mask.described(**{"seed": recipe.seed, **mask.about, **about, **live, "versions": packages})


def _movement(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How a mask has moved, a row per epoch: entries changed at the last update, the share ever kept, densities."""
    keys = ("tost/sparsity", "tost/mask/changed", "tost/mask/explored")
    return [
        {"epoch": row["epoch"], **{key.rpartition("/")[2]: row[key] for key in keys}, **row["densities"]}
        for row in history
    ]


@contextmanager
def _stoppable(job: Job) -> Iterator[None]:
    """The first Ctrl-C asks the loop to write a checkpoint and stop; a second one is the usual KeyboardInterrupt."""

    def ask(signum: int, frame: Any) -> None:
        job.stop = True
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: Ctrl-C is not ours to catch
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
