"""What the runner of grids costs: beside a bare loop over two processes, and on a Ray cluster one of whose nodes is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from interleave import Ratio, Row, timed

from tost_plugins.lab.grid import Cell, Cluster, finished, run
from tost_plugins.lab.progress import silent
from tost_plugins.lab.train import train
from tost_plugins.recipe.recipe import Recipe

TITLE = "Grids of runs"
ABOUT = """
A grid of 24 trainings of a second each (80 steps of `cifar/resnet8` on digits, one thread), `--jobs 2`, beside a bare loop: the
same trainings in a pool of two processes, without records, folders that go on, or anything else; both from a start without
processes to their end. Then 200 trainings of 0.2 s on Ray, on 4 nodes of one CPU each on this machine, and the same with one of
the nodes killed twice (SIGKILL to all its processes, after 60 and after 130 trainings) and put back each time. What is lost then:
the trainings that begin again, and the seconds in which the new node is started, by the process that hands out trainings, which
hands out none meanwhile. What a new node goes on to do, on the same two cores, is not counted as lost: "two nodes more" is the
same with two nodes started and none killed.

Ray sees that a node has died after 15 s (5 checks, 3 s apart), and until then often begins no training on the others either
(`findings/ray_killed_node_stops_all.sh`): that is most of what "killed twice" takes beside the work lost, and why it differs from
go to go. "Checked often" is the same on a cluster that looks twice a second and gives a node up after two checks
([how](lab.md#a-ray-cluster)).
"""
RATIOS = [
    Ratio("tost's grid, to a bare loop over two processes", "grid", "bare loop", most=1.15),
    Ratio("one node killed twice, to undisturbed", "killed", "undisturbed"),
    Ratio("one node killed twice, to undisturbed and the work lost", "killed", "undisturbed and lost", most=1.2),
    Ratio("two nodes more, to undisturbed", "two nodes more", "undisturbed"),
    Ratio("trainings begun again", "begun again", unit=""),
    Ratio("trainings that ended other than once", "not once", most=0, unit=""),
]
_STORE = 80 * 2**20
_OFTEN = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}


def cells(count: int, steps: int) -> list[Cell]:
    """Trainings that differ in their seeds."""
    data = {"name": "digits", "limit": 128, "batch_size": 32}
    content = {"mask": {"kind": "random", "sparsity": 0.5}, "model": "cifar/resnet8", "data": data}
    return [
        Cell(f"c{seed:03d}", Recipe.from_dict({**content, "name": "grid", "duration": f"{steps}ba", "seed": seed}),
             {"seed": seed}, measure=ended)
        for seed in range(count)
    ]  # fmt: skip


def ended(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Leaves a mark that this training has come to its end."""
    with (folder / "ends").open("a") as file:
        file.write("x")
    return []


def measure(small: bool) -> Iterator[Row]:
    """The rows."""
    os.environ["OMP_NUM_THREADS"] = "1"
    made = cells(4 if small else 24, 4 if small else 80)
    contenders = {"grid": partial(_grid, made), "bare loop": partial(_bare, made)}
    yield from timed(f"{len(made)} trainings of a second", contenders, 1 if small else 3, warm_up=0)
    made, turns = cells(8 if small else 200, 2 if small else 10), 1 if small else 2
    yield from _on_ray(
        f"{len(made)} trainings on 4 nodes", made, turns, ("undisturbed", "killed", "two nodes more"), {}
    )
    yield from _on_ray(
        f"{len(made)} trainings on 4 nodes, checked often", made, turns, ("undisturbed", "killed"), _OFTEN
    )


def _grid(made: list[Cell]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(made, folder, 2)


def _bare(made: list[Cell]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _alone) as pool,
    ):
        for future in [pool.submit(train, cell.recipe, Path(folder, cell.name)) for cell in made]:
            future.result()


def _alone() -> None:
    """As the grid's processes are."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _on_ray(case: str, made: list[Cell], turns: int, ways: tuple[str, ...], config: dict[str, int]) -> Iterator[Row]:
    """The same cells undisturbed, with a node killed, and with nodes started alone, in turn, on clusters of their own."""
    for turn in range(turns):
        seconds: dict[str, float] = {}
        for name in ways[:: 1 if turn % 2 == 0 else -1]:
            with _nodes(config) as (nodes, victim), tempfile.TemporaryDirectory() as folder:
                killer, start = _Killer(nodes, victim), time.perf_counter()
                listen = silent if name == "undisturbed" else killer.listen(len(made), name == "killed")
                run(made, folder, Cluster(nodes.address, gpus=0), listen=listen)
                seconds[name] = time.perf_counter() - start
                ends = [len((record["folder"] / "ends").read_text()) for record in finished(made, folder)]
            yield Row(case, name, turn, seconds[name], "s")
            if name == "killed":
                yield Row(case, "begun again", turn, killer.again, "")
                yield Row(case, "not once", turn, len(made) - ends.count(1), "")
                away, again = killer.away, killer.again / len(made)
        yield Row(case, "undisturbed and lost", turn, seconds["undisturbed"] * (1 + again) + away, "s")


@contextlib.contextmanager
def _nodes(config: dict[str, int]) -> Iterator[tuple[Any, Any]]:
    """A cluster of a head that runs nothing and four nodes of one CPU, and the last of these."""
    from ray.cluster_utils import Cluster as Nodes

    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE, "temp_dir": temporary}
    nodes = Nodes(initialize_head=True, head_node_args={**head, **({"_system_config": config} if config else {})})
    try:
        yield nodes, [nodes.add_node(num_cpus=1, object_store_memory=_STORE) for _ in range(4)][-1]
    finally:
        nodes.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


class _Killer:
    """Kills a node twice in the course of a grid and puts another in its place: how many cells began again, and how many seconds
    that took, in this process, in whose main thread alone Ray starts nodes."""

    def __init__(self, nodes: Any, victim: Any) -> None:
        self.nodes, self.victim, self.again, self.away = nodes, victim, 0, 0.0

    def listen(self, total: int, kill: bool) -> Callable[[str, dict[str, Any]], None]:
        """What the grid tells of its cells; without `kill` the other nodes come and none goes."""
        moments = [int(total * 0.3), int(total * 0.65)]

        def told(event: str, values: dict[str, Any]) -> None:
            self.again += event == "again"
            if event == "cell" and values["done"] in moments:
                start = time.perf_counter()
                if kill:
                    self.nodes.remove_node(self.victim, allow_graceful=False)
                self.victim = self.nodes.add_node(num_cpus=1, object_store_memory=_STORE)
                self.away += time.perf_counter() - start

        return told
