"""Cells on a Ray cluster, each a task of its own: https://docs.ray.io."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError, one_line, wrong
from tost_plugins.lab.grid.cell import Cell, record_of
from tost_plugins.lab.grid.order import Engine, Outcome
from tost_plugins.lab.grid.pool import interruptible
from tost_plugins.training.optional import package

#: What a cell needs to know of the environment of the process that began the grid.
_HANDED_ON = ("TOST_DATA", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
_PATIENCE = 60  # seconds until a file is on all nodes: NFS tells of new ones after half a minute
_LEAST_STORE = 80 * 2**20  # bytes: what travels is a few lines, and a container has little shared memory


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that a grid runs on, in a folder that all its nodes share.

    `address` is "auto" (the cluster that this machine is a node of), "local" (one of this machine alone, for the length of
    the grid) or HOST:PORT. A cell asks Ray for `cpus` and `gpus`, which may be fractions: 0.25 of a GPU is four cells on each.
    Without `gpus` it is one where the cluster has any, else none. At most `jobs` cells are under way; without, all for which
    there is room.

    Example:
        >>> Cluster("10.0.0.1:6379", gpus=0.25)
        Cluster(address='10.0.0.1:6379', cpus=1, gpus=0.25, jobs=None)
    """

    address: str = "auto"
    cpus: float = 1
    gpus: float | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if "://" in self.address or (self.address not in ("auto", "local") and ":" not in self.address):
            raise wrong("--ray", "auto, local or HOST:PORT", self.address, "run it on a node of the cluster")
        if self.jobs is not None and self.jobs < 1:
            raise wrong("--jobs", "at least 1", self.jobs, "leave it away to run as many as there is room for")
        for name, value in (("--cpus-per-cell", self.cpus), ("--gpus-per-cell", self.gpus or 0)):
            if not (math.isfinite(value) and value >= 0) or (value > 1 and value != int(value)):
                raise wrong(name, "a fraction up to 1, or a whole number", value, "0.25 puts four cells on one")


class Ray(Engine):
    """The tasks of a cluster, and this process as their driver."""

    def __init__(self, out: Path, cluster: Cluster) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
        self.ray: Any = package("ray", "--ray", "tost_plugins[cluster]")
        self.out, self.jobs, self.running = out.resolve(), cluster.jobs, dict[Any, Cell]()
        self.ours = not self.ray.is_initialized()
        if self.ours:
            self._connect(cluster.address)
        try:
            self.needs = self._needs(cluster)
        except TostError:
            self.close()
            raise
        environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        # Ray gives a process that has used a GPU no further task, since the next may have another one
        task = self.ray.remote(num_cpus=self.needs["CPU"], num_gpus=self.needs["GPU"], max_retries=0)(_on_a_node)
        self.task = partial(task.options, runtime_env={"env_vars": environment})

    def room(self) -> int:
        return self.jobs or 10**6

    def at_once(self) -> int:
        """How many cells the nodes that are there now have room for."""
        return max(1, min(self.room(), sum(_holds(node, self.needs) for node in self._nodes())))

    def start(self, cell: Cell) -> None:
        self.running[self.task(name=cell.name).remote(cell, self.out, Path.cwd())] = cell

    def ended(self) -> list[tuple[Cell, Outcome]]:
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        return [(cell := self.running.pop(ref), self._outcome(cell, ref)) for ref in done]

    def stop(self) -> None:
        for ref in self.running:
            self.ray.cancel(ref)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running))

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()
            self._say(True)

    def _connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            if host:  # Ray would wait for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            options = {"include_dashboard": False, "object_store_memory": _LEAST_STORE} if address == "local" else {}
            self.ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise TostError(
                f"--ray {address}: expected a Ray cluster that this machine is a node of, got none ({one_line(str(error))}); "
                f"start one with: ray start --head"
            ) from None
        self._say(False)

    def _say(self, aloud: bool) -> None:
        """Whether nodes tell of their dead on standard output, as they do else, log_to_driver or not."""
        self.ray._private.worker._worker_logs_enabled = aloud

    def _needs(self, cluster: Cluster) -> dict[str, float]:
        """What a cell asks for; raises TostError where no node has as much."""
        nodes = self._nodes()
        most = {name: max(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        needs = {"CPU": cluster.cpus, "GPU": min(most["GPU"], 1) if cluster.gpus is None else cluster.gpus}
        if not any(_holds(node, needs) for node in nodes):
            raise TostError(
                f"--ray {cluster.address}: expected a node with {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs for a cell, got "
                f"at most {most['CPU']:g} and {most['GPU']:g}; lower --cpus-per-cell or --gpus-per-cell"
            )
        return needs

    def _nodes(self) -> list[dict[str, float]]:
        """What each node that is alive has."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _outcome(self, cell: Cell, ref: Any) -> Outcome:
        try:
            outcome = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:  # before the cell had begun: a node lacks a package, say
            return Outcome("failed", f"{cell.name}: {one_line(str(error.cause))}")
        except self.ray.exceptions.RayError as error:
            return Outcome("died", f"{cell.name}: {one_line(str(error)).partition('. ')[0]}")
        until = time.monotonic() + _PATIENCE
        while outcome.how == "done" and record_of(cell, self.out) is None:
            if time.monotonic() > until:
                return Outcome("failed", f"{cell.name}: {_not_shared(self.out)}")
            time.sleep(0.5)
        return outcome


def _holds(node: dict[str, float], needs: dict[str, float]) -> int:
    """How many cells a node has room for."""
    return min((int(node.get(name, 0) / need + 1e-6) for name, need in needs.items() if need), default=10**6)


def _on_a_node(cell: Cell, out: Path, folder: Path) -> Outcome:
    """A cell, in a process of a node; the folder is where the grid was started, for paths in recipes."""
    if not (out / "lock").exists():
        return Outcome("failed", f"{cell.name}: {_not_shared(out)}")
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return interruptible(cell, out)


def _not_shared(out: Path) -> str:
    return f"--out {out}: expected a folder that all nodes share, got one that {socket.gethostname()} sees otherwise"
