"""Runs one script several times, each time in processes of its own: `python launch.py SCRIPT FOLDER ROUNDS`.

ROUNDS is JSON: a list of rounds, one after another, each {name: [ranks, [arguments]]} of runs side by side, which write to
FOLDER/<name>. What the script imports is imported once, here; the processes are forks from that moment, which saves most of
their time. Several ranks have the environment that torchrun gives them. Ends with status 1, and what was printed, if one fails.
"""

import ast
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed as dist


def imports(script: Path) -> None:
    """Import what the script does, and nothing more."""
    tree = ast.parse(script.read_text())
    lines = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(lines, []), str(script), "exec"), {})


def fork(script: Path, folder: Path, args: list[str], **environment: object) -> int:
    """The id of a new process that runs the script; it ends with status 1 after an error."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"log.{environment.get('RANK', 0)}", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update({name: str(value) for name, value in environment.items()})
        sys.argv = [str(script), *args]
        runpy.run_path(str(script), run_name="__main__")
        if dist.is_initialized():
            dist.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's own farewell was seen to hang when the other rank is gone first


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(script: Path, folder: Path, ranks: int, args: list[str]) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    args = [*args, "--output_dir", str(folder)]
    if ranks == 1:
        return [fork(script, folder, args)]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [fork(script, folder, args, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(ranks)]


def wait(processes: dict[int, Path]) -> list[Path]:
    """Wait for all of them; after an error the others of that run are ended. Returns the folders of runs that failed."""
    failed = []
    while processes:
        process, status = os.wait()
        folder = processes.pop(process)
        if status:
            failed.append(folder)
            for other in [other for other, where in processes.items() if where == folder]:
                os.kill(other, 9)
    return failed


def main(script: Path, folder: Path, rounds: list[dict[str, tuple[int, list[str]]]]) -> int:
    imports(script)
    for runs in rounds:
        processes = {}
        for name, (ranks, args) in runs.items():
            processes |= dict.fromkeys(start(script, folder / name, ranks, args), folder / name)
        for failed in dict.fromkeys(wait(processes)):
            for log in sorted(failed.glob("log.*")):
                print(f"---- {log}\n{log.read_text()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
