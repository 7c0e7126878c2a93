"""`--ray`: grids on a Ray cluster, here one of several nodes on one machine, some of which are killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import refused, tost
from test_grid import killing, refuses, tiny

from tost_plugins.lab import grid
from tost_plugins.lab.cli.arguments import recipe_of
from tost_plugins.lab.compare import compare
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training.clock import Time

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("ray")

STORE = 80 * 2**20  # of shared memory a node: a container may have as little as 64 MB, and Ray takes a file then
LONG = {"duration": Time.parse("40ep")}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of a head that runs no cells and two nodes, each with two CPUs and half of them with a GPU that is only said
    to be there."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if "tests" in Path(path).parts)
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Ray's sockets lie deep below it
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=STORE)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    del os.environ["PYTHONPATH"]
    os.environ |= {"PYTHONPATH": before} if before is not None else {}


def where(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The GPUs that Ray has given to this cell."""
    import ray

    return [{"gpus": ray.get_gpu_ids(), "threads": os.environ["OMP_NUM_THREADS"], "folder": os.getcwd()}]


def pid_of(name: str) -> int:
    """The process that runs a cell: Ray calls it so."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::{name}".encode()):
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no process runs {name}")


def test_a_cluster_gives_what_one_after_another_gives(
    nodes: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = [
        tiny("parent"), tiny("child", parent="parent", shuffle=True), tiny("bad", measure=refuses), tiny("a", measure=where),
        tiny("orphan", parent="bad"),
    ]  # fmt: skip
    done, told = [cells[0], cells[1], cells[3]], []
    grid.run([cells[0], cells[1], tiny("a")], tmp_path / "here")
    where_it_runs = grid.Cluster(nodes.address, gpus=0.5)
    text = refused(
        lambda: grid.run(cells, tmp_path / "there", where_it_runs, listen=lambda e, v: told.append((e, v["name"])))
    )
    assert "got 2 that failed (bad: expected the impossible, got what there is; ask for less" in text
    assert sorted(told) == [
        ("cell", "a"),
        ("cell", "child"),
        ("cell", "parent"),
        ("failed", "bad"),
        ("failed", "orphan"),
    ]
    assert told.index(("cell", "parent")) < told.index(("cell", "child"))
    for cell in done:
        one, two = (tmp_path / place / cell.name / "model.safetensors" for place in ("here", "there"))
        assert one.read_bytes() == two.read_bytes()
    (record,) = grid.finished([cells[3]], tmp_path / "there")
    assert record["rows"] == [{"gpus": [0], "threads": os.environ["OMP_NUM_THREADS"], "folder": str(Path.cwd())}]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["worker", pytest.param("node", marks=pytest.mark.long)])
def test_what_is_killed_goes_on_from_its_checkpoint(
    nodes: Any, what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = tiny(f"{what}-{os.getpid()}")
    cell = dataclasses.replace(cell, recipe=cell.recipe.model_copy(update=LONG))
    (whole,) = grid.run([cell], tmp_path / "whole")
    cluster, told = grid.Cluster(nodes.address, gpus=0), []
    third = nodes.add_node(num_cpus=3, object_store_memory=STORE) if what == "node" else None
    if third is not None:
        cluster = dataclasses.replace(cluster, cpus=3)  # which fits there alone, and then on the next one

    def kill() -> None:
        if third is None:
            os.kill(pid_of(cell.name), signal.SIGKILL)
        else:
            nodes.remove_node(third, allow_graceful=False)

    def listen(event: str, values: dict[str, Any]) -> None:
        told.append((event, values))
        if event == "again" and what == "node":
            nodes.add_node(num_cpus=3, object_store_memory=STORE)

    thread = killing(tmp_path / "killed" / cell.name / "checkpoints", kill)
    (killed,) = grid.run([cell], tmp_path / "killed", cluster, listen=listen)
    thread.join()
    assert [event for event, _ in told] == ["again", "cell"], told
    assert killed["result"] == whole["result"]
    assert killed["seconds"] > 0 and (tmp_path / "killed" / cell.name / "cell.json").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_the_command_stops_at_ctrl_c_and_goes_on(nodes: Any, tmp_path: Path) -> None:
    changes = ["data.limit=64", "data.batch_size=32", "model=cifar/resnet8", "duration=30ep"]
    command = [sys.executable, "-m", "tost_plugins", "compare", "quickstart", "--seeds", "1", "--json", "--resume"]
    command += [part for change in changes for part in ("--set", change)]
    command += ["--ray", nodes.address, "--gpus-per-cell", "0", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list((tmp_path / "run").glob("*/checkpoints/*"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, ""), said
    assert " ".join(said.split()).startswith("stopped; what had begun goes on from its checkpoint; the same command"), (
        said
    )
    steps = [
        json.loads((path / "progress.json").read_text())["step"]
        for path in (tmp_path / "run").iterdir()
        if path.is_dir()
    ]
    assert len(steps) == 2 and max(steps) > 0
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    whole = compare(recipe_of("quickstart", changes), tmp_path / "whole", 1)
    assert json.loads(done.stdout)["rows"] == whole["rows"]


def test_what_no_cluster_can_do_is_one_line(nodes: Any, tmp_path: Path) -> None:
    def run(cluster: grid.Cluster) -> object:
        return grid.run([tiny("a")], tmp_path, cluster)

    refused(
        lambda: run(grid.Cluster(nodes.address, gpus=2)),
        "expected a node with 1 CPUs and 2 GPUs",
        "at most",
        "and 1; lower",
    )
    refused(
        lambda: run(grid.Cluster("127.0.0.1:9")), "--ray 127.0.0.1:9", "got none", "start one with: ray start --head"
    )
    refused(lambda: grid.Cluster("ray://127.0.0.1:10001"), "--ray", "expected auto, local or HOST:PORT")
    refused(lambda: grid.Cluster(gpus=1.5), "--gpus-per-cell", "a whole number", "got 1.5")
    refused(lambda: grid.Cluster(jobs=0), "--jobs", "at least 1")
    refused(
        lambda: tost("study", "freeze", "--gpus-per-cell", "1"), "--gpus-per-cell: expected --ray ADDRESS beside it"
    )
