"""Training scripts as people write them, each with and without the one line: the same data in the same order, the plain
network's evaluation, and an end that is sparse and plain; on one rank and on two.

Each script is run as it would be from the shell, by `launch.py`: every run in processes of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command import tost
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
DEFAULT = "tost_any_mask"  # 90 %
MOVING = """
mask: {kind: rigl, sparsity: 0.8, every: 2ba, until: 0.75dur}
tweaks:
  - {kind: ghost_skip, until: 0.3dur, optional: true}
  - {kind: soft_activation, until: 0.5dur, optional: true}
  - {kind: label_smoothing, optional: true}
"""

Notes = dict[str, Any]
Found = dict[str, list[Notes]]


class Script(NamedTuple):
    """What it needs; its arguments for a run, and for an evaluation of the checkpoint that the run left in a folder; what else
    is run, and looked at."""

    needs: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    evaluate: Callable[[Path], list[str]] = lambda folder: ["--test_only", "--resume", str(folder / "model.0.pt")]
    also: Callable[[Path], dict[str, Any]] = lambda folder: {}
    look: Callable[[Path, Found], None] = lambda folder, found: None


def run(name: str, folder: Path) -> Found:
    """Run name -> what each rank noted."""
    script, moving = SCRIPTS[name], folder / "moving.yaml"
    moving.write_text(MOVING)
    line, train = ["--tost", DEFAULT], list(script.train)
    rounds = [
        {"plain": (1, train), "tost": (1, [*train, *line])},
        {
            "plain, evaluated": (1, [*script.evaluate(folder / "plain"), *line]),
            "tost, evaluated": (1, script.evaluate(folder / "tost")),
            "plain, two": (2, train),
            "tost, two": (2, [*train, *line]),
            "moving": (1, [*train, "--tost", str(moving)]),
            **script.also(folder),
        },
    ]
    command = [sys.executable, str(HERE / "launch.py"), str(HERE / f"{name}.py"), str(folder), json.dumps(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    ranks = {key: range(runs[key][0]) for runs in rounds for key in runs}
    return {key: [json.loads((folder / key / f"notes.{r}.json").read_text()) for r in ranks[key]] for key in ranks}


def saved(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """The network that a run has saved, flat."""
    if (folder / "model").is_dir():
        return load_file(folder / "model" / "model.safetensors")
    state = torch.load(folder / f"model.{rank}.pt")
    nested = not isinstance(next(iter(state.values())), torch.Tensor)
    return {f"{a}.{b}": value for a, part in state.items() for b, value in part.items()} if nested else state


def check_data(found: Found) -> None:
    for without, with_it in (("plain", "tost"), ("plain", "moving"), ("plain, two", "tost, two")):
        for one, other in zip(found[without], found[with_it], strict=True):
            assert one["steps"] == other["steps"] > 5
            assert one["data"] == other["data"], f"{with_it} saw other data than {without}"
    assert found["plain, two"][0]["data"] != found["plain, two"][1]["data"]


def check_evaluation(found: Found) -> None:
    (plain,), (line,) = found["plain"], found["tost"]
    assert line["before"] == plain["before"] != plain["after"] != line["after"]
    assert found["plain, evaluated"][0]["before"] == plain["after"]
    assert found["tost, evaluated"][0]["before"] == line["after"]
    for one, other in zip(found["plain, two"], found["tost, two"], strict=True):
        assert one.get("before") == other.get("before")


def check_end(found: Found, folder: Path, networks: int) -> None:
    (plain,), reference = found["plain"], saved(folder / "plain")
    # within one weight for each network; RigL's layers have counts of their own
    for name, sparsity, within in (("tost", 0.9, networks), ("tost, two", 0.9, networks), ("moving", 0.8, 10)):
        for rank, end in enumerate(found[name]):
            assert abs(end["zeros"] - sparsity * end["of"]) <= within, (name, end["zeros"], end["of"])
            assert all(end[part] == plain[part] for part in ("of", "keys", "modules", "hooks")), name
            state = saved(folder / name, rank)
            assert [*state] == [*reference] and {*state} <= {*plain["keys"]}, name
            assert sum(int((value == 0).sum()) for value in state.values()) >= end["zeros"]


def check_ranks(found: Found) -> None:
    for name in ("plain, two", "tost, two"):
        first, second = found[name]
        assert first["weights"] == second["weights"], name
    assert found["tost, two"][0]["weights"] != found["plain, two"][0]["weights"]


def check_lines(folder: Path, networks: int) -> None:
    """The line of a run comes once for each network, from rank 0, and none without a run."""
    for name in ("tost", "moving", "tost, two", "plain, evaluated"):
        lines = [log.read_text().count("tost: recipe ") for log in sorted((folder / name).glob("log.*"))]
        assert lines == [0 if "evaluated" in name else networks, 0][: len(lines)], name


# ---- what else is looked at


def hf_also(folder: Path) -> dict[str, Any]:
    train = [arg for arg in SCRIPTS["hf_image_classification"].train if arg != "--do_eval"]
    return {"plain, train only": (1, train), "tost, train only": (1, [*train, "--tost", DEFAULT])}


def look_at_hf(folder: Path, found: Found) -> None:
    (plain,), (line,) = found["plain, train only"], found["tost, train only"]
    assert line["data"] == plain["data"] and line["keys"] == plain["keys"]
    assert line["zeros"] == found["tost"][0]["zeros"] > plain["zeros"]
    history = json.loads((folder / "tost" / "trainer_state.json").read_text())["log_history"]
    assert any("tost/sparsity" in entry for entry in history)


def look_at_accelerate(folder: Path, found: Found) -> None:
    assert found["resumed"][0]["weights"] == found["tost"][0]["weights"]
    assert found["resumed"][0]["after"] == found["tost"][0]["after"]


def lightning_also(folder: Path) -> dict[str, Any]:
    return {"resumed": (1, ["--tost", DEFAULT, "--ckpt_path", str(folder / "tost" / "last.ckpt"), "--epochs=4"])}


def look_at_lightning(folder: Path, found: Found) -> None:
    """A module of its own loads the checkpoints; a longer run goes on from the last."""
    for name in ("tost", "moving"):
        state = torch.load(folder / name / "last.ckpt", weights_only=True)["state_dict"]
        assert [*state] == found["plain"][0]["keys"] and all(
            map(torch.equal, state.values(), saved(folder / name).values())
        )
    (resumed,), (line,) = found["resumed"], found["tost"]
    assert resumed["steps"] == line["steps"] // 3 and resumed["zeros"] == line["zeros"]


def static_graph(folder: Path) -> dict[str, Any]:
    line = ["--gradient_accumulation_steps=1", "--tost", DEFAULT]  # torch takes no steps apart under a static graph
    return {"no static graph": (2, line), "static graph": (2, [*line, "--ddp_static_graph"])}


def look_at_static_graph(folder: Path, found: Found) -> None:
    """The loss comes out of DDP, which waits for its gradients, and labels are smoothed in it."""
    assert len({rank["weights"] for name in ("no static graph", "static graph") for rank in found[name]}) == 1
    assert all(", label_smoothing" in (folder / name / "log.0").read_text() for name in static_graph(folder))


def look_at_averages(folder: Path, found: Found) -> None:
    """The average is evaluated as the plain sparse network that it becomes."""
    for name in ("tost", "moving", "tost, two"):
        for end in found[name]:
            ema = torch.load(folder / name / "ema.0.pt")
            assert [*ema] == found["plain"][0]["keys"]
            zeros = sum(int((value == 0).sum()) for key, value in ema.items() if key.endswith("weight"))
            assert zeros >= end["zeros"], name
            assert end["ema"][0] == end["ema"][1] or name == "moving"


def look_at_torchvision(folder: Path, found: Found) -> None:
    look_at_averages(folder, found)
    tost("export", folder / "tost" / "checkpoint.0.pth", folder / "exported.safetensors")
    exported, end = load_file(folder / "exported.safetensors"), saved(folder / "tost")
    assert exported.keys() == end.keys() and all(torch.equal(exported[key], value) for key, value in end.items())


def look_at_regression(folder: Path, found: Found) -> None:
    assert {*torch.load(folder / "plain" / "best.0.pt")} == {*found["plain"][0]["keys"]}
    tost("export", folder / "tost" / "best.0.pt", folder / "best.safetensors")  # kept from when the network was plain
    assert {*load_file(folder / "best.safetensors")} == {*found["plain"][0]["keys"]}


def look_at_recurrent(folder: Path, found: Found) -> None:
    """Every weight of the LSTM is sparse; ghosts and activations are none of its."""
    for name in ("tost", "moving", "tost, two"):
        weights = {key: value for key, value in saved(folder / name).items() if key.startswith("rnn.weight")}
        assert len(weights) == 4 and all(0.5 < float((w == 0).float().mean()) < 1 for w in weights.values()), name
        assert found[name][0]["after"]["perplexity"] < found[name][0]["before"]["perplexity"]


SCRIPTS = {
    "accelerate_vision": Script(
        needs=("accelerate",),
        also=lambda folder: {
            "resumed": (1, ["--tost", DEFAULT, "--resume_from_checkpoint", str(folder / "tost" / "epoch_0")])
        },
        look=look_at_accelerate,
    ),
    "dcgan": Script(),
    "hf_image_classification": Script(
        needs=("transformers", "datasets"),
        train=(
            "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs=2", "--per_device_train_batch_size=8",
            "--learning_rate=0.01", "--remove_unused_columns=False", "--save_strategy=epoch", "--report_to=none",
        ),
        evaluate=lambda folder: [
            "--do_eval", "--use_cpu", "--remove_unused_columns=False", "--report_to=none", "--model_name_or_path",
            str(folder / "model"),
        ],
        also=hf_also,
        look=look_at_hf,
    ),
    "language_model": Script(needs=("transformers", "accelerate"), also=static_graph, look=look_at_static_graph),
    "lightning_vision": Script(needs=("lightning",), also=lightning_also, look=look_at_lightning),
    "recurrent_model": Script(look=look_at_recurrent),
    "regression": Script(look=look_at_regression),
    "segmentation": Script(),
    "timm_loop": Script(needs=("timm",), train=("--smoothing=0.1",), look=look_at_averages),
    "torchvision_references": Script(needs=("torchvision",), train=("--mixup",), look=look_at_torchvision),
}  # fmt: skip


def test_torchrun_starts_one_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [str(HERE / "regression.py"), "--epochs", "2", "--tost", DEFAULT, "--output_dir", str(tmp_path)]
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stderr.count("tost: recipe ") == 1, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"notes.{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"] and first["data"] != second["data"]
    assert abs(first["zeros"] - 0.9 * first["of"]) <= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_and_without_the_line(name: str, tmp_path: Path) -> None:
    for package in SCRIPTS[name].needs:
        pytest.importorskip(package)
    found, networks = run(name, tmp_path), 2 if name == "dcgan" else 1
    check_data(found)
    check_evaluation(found)
    check_end(found, tmp_path, networks)
    check_ranks(found)
    check_lines(tmp_path, networks)
    SCRIPTS[name].look(tmp_path, found)
