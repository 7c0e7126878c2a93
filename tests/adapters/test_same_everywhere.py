"""One recipe, five trainers: the same mask, history and network; and each stops and goes on without a trace."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tost_plugins import Mask, TostError
from tost_plugins.lab import models
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import prepare, train
from tost_plugins.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, PER_EPOCH = 8, 4
#: What each leaves behind when it dies while it writes its first checkpoint.
UNFINISHED = {
    "torch": "last.pt.tmp",
    "accelerate": "writing/model.safetensors",
    "transformers": "checkpoint-1/model.safetensors",
    "composer": "writing.pt",
    "lightning": "writing.pt",
}
TRAINERS = tuple(UNFINISHED)
RECIPE = {
    "name": "same",
    "mask": {"kind": "snip", "sparsity": 0.9},
    "tweaks": [
        {"kind": "ghost_skip", "until": "0.4dur"},
        {"kind": "soft_activation", "until": "0.75dur"},
        {"kind": "rescaled_init", "iterations": 2},
        {"kind": "label_smoothing", "alpha": 0.1},
    ],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 256, "batch_size": 64},
    "optimizer": {"lr": 0.05, "nesterov": True},
    "schedule": {"kind": "cosine", "warmup": "2ba"},
    "duration": "2ep",
}
Run = dict[str, Any]


def recipe(trainer: str, **changes: Any) -> Recipe:
    """The recipe for a trainer; skips the test where that is not installed."""
    if trainer != "torch":
        pytest.importorskip(trainer)
    return Recipe.from_dict({**RECIPE, "trainer": trainer, **changes})


def installed(trainer: str) -> bool:
    return trainer == "torch" or importlib.util.find_spec(trainer) is not None


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def stop_at(step: int) -> Any:
    """A listener that presses Ctrl-C when a step is done."""

    def listen(event: str, values: dict[str, Any]) -> None:
        if event == "step" and values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trainer -> the folder of its whole run and the result."""
    done: dict[str, tuple[Path, Run]] = {}

    def run(trainer: str) -> tuple[Path, Run]:
        spec = recipe(trainer)
        if trainer not in done:
            out = tmp_path_factory.mktemp(trainer) / "run"
            done[trainer] = out, train(spec, out)
        return done[trainer]

    return run


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_leaves_a_sparse_plain_network(runs: Any, trainer: str) -> None:
    out, result = runs(trainer)
    fresh = models.build("cifar/resnet8", 10, 1)
    fresh.load_state_dict(weights(out), strict=True)
    mask = Mask.load(out / "mask.safetensors")
    assert abs(mask.sparsity - 0.9) < 1e-4 and result["sparsity"] == mask.sparsity
    for name, keep in mask.items():
        assert not fresh.get_parameter(name)[~keep].any() and keep.any()
    assert result["tweaks"] == ["ghost_skip", "soft_activation", "rescaled_init", "label_smoothing"]
    assert result["left_out"] == [] and result["trainer"] == trainer
    assert [row["step"] for row in result["history"]] == [PER_EPOCH, STEPS]
    alphas = [row["tost/ghost_skip/alpha"] for row in result["history"]]
    assert alphas == [0.0, 0.0] and [row["tost/soft_activation/active"] for row in result["history"]] == [1.0, 0.0]
    assert json.loads((out / "result.json").read_text()) == result


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_every_trainer_ends_with_the_same_network(runs: Any, trainer: str) -> None:
    out, result = runs(trainer)
    expected, plain = runs("torch")
    assert same(dict(Mask.load(out / "mask.safetensors")), dict(Mask.load(expected / "mask.safetensors")))
    assert result["history"] == plain["history"]
    assert same(weights(out), weights(expected))
    assert {**result, "trainer": "torch"} == plain


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_ctrl_c_in_an_epoch_and_resume(runs: Any, tmp_path: Path, trainer: str, step: int) -> None:
    out, result = runs(trainer)
    with pytest.raises(Stopped, match=f"stopped at step {step} of {STEPS}"):
        train(recipe(trainer), tmp_path, listen=stop_at(step))
    assert not (tmp_path / "result.json").exists()
    steps: list[int] = []
    resumed = train(
        recipe(trainer), tmp_path, resume=True, listen=lambda e, v: steps.append(v["step"]) if e == "step" else None
    )
    assert steps == list(range(step + 1, STEPS + 1))
    assert resumed == result and same(weights(tmp_path), weights(out))
    assert same(dict(Mask.load(tmp_path / "mask.safetensors")), dict(Mask.load(out / "mask.safetensors")))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "mask",
    [{"kind": "rigl", "sparsity": 0.9, "every": "1ba", "until": "5ba"}, {"kind": "dnw", "sparsity": 0.9}],
    ids=lambda mask: mask["kind"],
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_ctrl_c_and_resume_with_a_mask_that_moves(tmp_path: Path, trainer: str, mask: dict[str, Any]) -> None:
    spec = recipe(trainer, mask=mask, tweaks=[], duration="5ba")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(spec, whole)
    with pytest.raises(Stopped, match="stopped at step 2 of 5"):
        train(spec, stopped, listen=stop_at(2))
    assert train(spec, stopped, resume=True) == result and same(weights(stopped), weights(whole))
    assert Mask.load(stopped / "mask.safetensors") == Mask.load(whole / "mask.safetensors")
    assert all(row["tost/mask/changed"] > 0 and row["tost/mask/explored"] > 0.1 for row in result["history"])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_crash_goes_on_from_the_last_epoch(runs: Any, tmp_path: Path, trainer: str) -> None:
    out, result = runs(trainer)

    def crash(event: str, values: dict[str, Any]) -> None:
        if event == "step" and values["step"] == 6:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(recipe(trainer), tmp_path, listen=crash)
    assert train(recipe(trainer), tmp_path, resume=True) == result and same(weights(tmp_path), weights(out))
    # once more, as if it had died after the last checkpoint: nothing is left to train
    (tmp_path / "result.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert train(recipe(trainer), tmp_path, resume=True) == result and same(weights(tmp_path), weights(out))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_ends_within_an_epoch(tmp_path: Path, trainer: str) -> None:
    spec = recipe(trainer, duration="6ba", tweaks=[], mask={"kind": "random", "sparsity": 0.9, "allocation": "erk"})
    result = train(spec, tmp_path)
    assert [row["step"] for row in result["history"]] == [4, 6]
    (tmp_path / "result.json").unlink()
    assert train(spec, tmp_path, resume=True) == result


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_was_being_written_is_not_read(tmp_path: Path, trainer: str) -> None:
    spec = recipe(trainer, duration="2ba", tweaks=[], mask={"kind": "random", "sparsity": 0.9, "allocation": "erk"})
    result = train(spec, tmp_path / "whole")
    path = tmp_path / "broken" / "checkpoints" / UNFINISHED[trainer]
    path.parent.mkdir(parents=True)
    path.write_text("half a")
    assert train(spec, tmp_path / "broken", resume=True) == result


@pytest.mark.parametrize("trainer", TRAINERS)
def test_folders_of_other_runs_are_left_alone(runs: Any, trainer: str) -> None:
    out, result = runs(trainer)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(TostError, match="expected a new folder, got one that holds a run; add --resume"):
        train(recipe(trainer), out)
    with pytest.raises(TostError, match=r"expected the recipe that .* was started with, got another one"):
        train(recipe(trainer, mask={"kind": "snip", "sparsity": 0.8}), out, resume=True)
    assert train(recipe(trainer), out, resume=True) == result
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


class Dropping(nn.Sequential):
    """A network whose training draws random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3),
            nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
            nn.Linear(72, 10),
        )  # fmt: skip


def test_dropout_is_the_same_everywhere_and_after_a_stop(tmp_path: Path) -> None:
    ends = {}
    for trainer in filter(installed, TRAINERS):
        for stopped in (False, True):
            out = tmp_path / f"{trainer}{stopped}"
            run = importlib.import_module(f"tost_plugins.lab.loops.{trainer}").run
            for resume in (False, True) if stopped else (False,):
                job = prepare(recipe(trainer), out)
                out.mkdir(exist_ok=True)
                job.model, seen = Dropping(), []
                if stopped and not resume:
                    job.listen = lambda event, values, job=job: setattr(job, "stop", values.get("step") == 3)
                with pytest.raises(Stopped) if stopped and not resume else contextlib.nullcontext():
                    run(job, resume)
                seen.append(job.history)
            ends[trainer, stopped] = ({k: v.clone() for k, v in job.model.state_dict().items()}, job.history)
    first = ends["torch", False]
    assert {
        key: same(state, first[0]) and history == first[1] for key, (state, history) in ends.items()
    } == dict.fromkeys(ends, True)


SHELL = """
import os, signal, sys
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import train
press = lambda event, values: values.get("step") == 3 and os.kill(os.getpid(), signal.SIGINT)
for path in sys.argv[1:]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(Recipe.load(path), path.removesuffix(".yaml"), listen=press)
    except Stopped as stop:
        print(stop)
"""


def test_it_is_quiet(tmp_path: Path) -> None:
    paths = [tmp_path / f"{trainer}.yaml" for trainer in TRAINERS if installed(trainer)]
    for path in paths:
        recipe(path.stem).to_yaml(path)
    done = subprocess.run(
        [sys.executable, "-c", SHELL, *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"stopped at step 3 of {STEPS}\n" * len(paths)
    assert [line for line in done.stderr.splitlines() if not line.startswith("tost: ")] == []
    for path in paths:
        assert train(recipe(path.stem), path.with_suffix(""), resume=True)["history"][-1]["step"] == STEPS
