"""Watching a run in progress, in any trainer: a recipe's `watch` measures while the network trains and writes CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import write_csv
from tost_plugins.masks.mask import Mask
from tost_plugins.session.watch.activations import activation_sparsity
from tost_plugins.session.watch.curvature import curvature
from tost_plugins.session.watch.emergence import emergence
from tost_plugins.session.watch.in_degree import in_degree
from tost_plugins.training import ranks
from tost_plugins.training.batches import to_device
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import is_transposed, owners
from tost_plugins.training.task import Task, untouched

Row = dict[str, Any]
Measure = Literal["in_degree", "emergence", "activation_sparsity", "curvature"]

#: What needs a batch of the run's data, the same one at every look: the network and its mask -> rows.
_WITH_DATA: dict[str, Callable[[Task, Mask], list[Row]]] = {
    "activation_sparsity": lambda task, mask: activation_sparsity(task.model, task.batches or (), forward=task.forward),
    "curvature": curvature,
}


def _listed(value: Any) -> Any:
    """`watch: in_degree` and `watch: [in_degree, curvature]` stand for their `measures`."""
    value = [value] if isinstance(value, str) else value
    return {"measures": value} if isinstance(value, (list, tuple)) else value


class Watch(BaseModel):
    """What to measure while a run goes on, how often, and where to write it: a CSV file for each measure.

    `measures` are in_degree, emergence (overlaps of the mask, written when the run is over; the masks themselves are
    kept in `out`/masks), activation_sparsity and curvature (which takes seconds and more at each look). `every` is the
    time between two looks; the first is before the first step, the last after the last one. `out` is a folder; None is
    `tost-watch`, and for `tost train` `watch` in the run's own. `batches` is how many of the first batches the
    measures that look at data take.

    With several ranks, rank 0 looks at its own copy of the network and its own batches, and the others wait.

    Example:
        >>> Watch(measures=["in_degree"], every="100ba").every.steps(Clock())
        100
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    measures: Annotated[tuple[Measure, ...], Field(min_length=1)]
    every: TimeField = Time(1, "ep")
    out: str | None = None
    batches: Annotated[int, Field(ge=1), NUMBER] = 1

    def begin(self, task: Task, clock: Clock) -> Watcher:
        """A watcher for a run that starts, or goes on, at this clock."""
        return Watcher(self, task, clock)


#: A recipe's key `watch`: None, one measure, a list of them, or the whole of `Watch`.
WatchField = Annotated[Watch | None, BeforeValidator(_listed)]


class Watcher:
    """The looks at one run. A run that goes on keeps what it had seen up to there, and forgets what came later."""

    def __init__(self, spec: Watch, task: Task, clock: Clock) -> None:
        self.spec, self.out = spec, Path(spec.out or "tost-watch")
        try:
            self.every = spec.every.steps(clock)
        except TostError as error:
            raise error.at("watch.every") from None
        if self.every < 1:
            raise TostError(f"watch.every: expected at least one step, got {str(spec.every)!r}; write '1ep' or '100ba'")
        self.here = ranks.rank() == 0
        self.task = Task(task.model, task.params, self._batches(task), task.loss_fn, task.forward, task.criterion)
        self.rows: dict[str, list[Row]] = {name: _read(self.out / f"{name}.csv", clock.step) for name in spec.measures}
        self.last = clock.step if all(rows and rows[-1]["step"] == clock.step for rows in self.rows.values()) else -1
        for step, path in self._files().items() if self.here else ():
            if step > clock.step:
                path.unlink()

    def due(self, clock: Clock) -> bool:
        """Whether to look now: rank 0, once at each moment, the last step included."""
        on_time = clock.step % self.every == 0 or clock.step == clock.total_steps
        return self.here and on_time and clock.step != self.last

    def look(self, mask: Mask, clock: Clock) -> None:
        """Measure, and write all that has been seen."""
        self.last = clock.step
        when = {"step": clock.step, "epoch": _epoch(clock.step, clock)}
        for name in self.spec.measures:
            before = [row for row in self.rows[name] if row["step"] < clock.step]  # a checkpoint may lead back
            self.rows[name] = before + [{**when, **row} for row in self._measure(name, mask, clock)]
            write_csv(self.out / f"{name}.csv", self.rows[name])

    def finish(self, mask: Mask, clock: Clock) -> None:
        """The last look, and the overlaps, which need the last mask."""
        if not self.here:
            return
        if clock.step != self.last:
            self.look(mask, clock)
        if "emergence" in self.spec.measures:
            rows = [
                {"step": row["step"], "epoch": _epoch(row["step"], clock), **row} for row in emergence(self._masks())
            ]
            write_csv(self.out / "emergence.csv", rows)

    def _measure(self, name: str, mask: Mask, clock: Clock) -> list[Row]:
        if name == "in_degree":
            layers = owners(self.task.model, dict(self.task.params))
            return in_degree({n: kept.t() if is_transposed(layers.get(n)) else kept for n, kept in mask.items()})
        if name == "emergence":
            mask.save(self.out / "masks" / f"step-{clock.step:08d}.safetensors", card=False)
            return [{"sparsity": mask.sparsity}]
        return _WITH_DATA[name](self.task, mask)

    def _batches(self, task: Task) -> list[Any] | None:
        """The first batches, kept on the CPU: a loader that shuffles gives others each time. Every rank reads its own, since
        loaders of several ranks may talk to each other; the order of the run's data stays what it was."""
        if not _WITH_DATA.keys() & set(self.spec.measures):
            return None
        with untouched(task.model, task.batches, train=task.model.training):
            return [to_device(batch, torch.device("cpu")) for batch in task.take(self.spec.batches, "watch")]

    def _masks(self) -> dict[int, Mask]:
        return {step: Mask.load(path) for step, path in self._files().items()}

    def _files(self) -> dict[int, Path]:
        return {int(path.stem.removeprefix("step-")): path for path in (self.out / "masks").glob("step-*.safetensors")}


def _read(path: Path, step: int) -> list[Row]:
    """What was written up to this step; nothing for a run that starts."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["step"] <= step]


def _epoch(step: int, clock: Clock) -> float | None:
    return step / clock.steps_per_epoch if clock.steps_per_epoch else None


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
