#!/usr/bin/env bash
# ray 2.60.0: with log_to_driver=False a driver's standard output still gets what nodes say of their dead.
# Expected: nothing; log_to_driver=False, and logging_level=ERROR besides, are there to keep the output of others away, and
#   RAY_LOG_TO_DRIVER=0 as well.
# Seen: a worker that is killed is a line on standard output, a node that is killed more than 20 (the end of its log),
#   in yellow, though the exception that `ray.get` raises says the same. They come over another channel, which every driver
#   prints (`listen_error_messages` in ray/_private/worker.py), with is_err False.
# Hit: programs whose standard output is read by another, such as one JSON object, once something dies.
# Remedy: none that is public. ray._private.worker._worker_logs_enabled = False, which Ray's debugger sets, is one.
# Output seen:
#   ray 2.60.0
#   a worker was killed: WorkerCrashedError, 1 line on standard output: "(raylet) A worker died or was killed while executing"
#   the same with _worker_logs_enabled = False: WorkerCrashedError, 0 lines
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile ray==2.60.0 setuptools
cd "$work"
cat >driver.py <<'EOF'
import logging
import os
import signal
import sys
import time

import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
         logging_level=logging.ERROR)
if "quiet" in sys.argv:
    ray._private.worker._worker_logs_enabled = False


@ray.remote(max_retries=0)
def dies():
    os.kill(os.getpid(), signal.SIGKILL)


try:
    ray.get(dies.remote())
except ray.exceptions.RayError as error:
    print(type(error).__name__, file=sys.stderr)
time.sleep(3)  # for messages that are under way
EOF
export RAY_USAGE_STATS_ENABLED=0 RAY_LOG_TO_DRIVER=0
venv/bin/python -c 'import ray; print("ray", ray.__version__)'
venv/bin/python driver.py >loud 2>said
start=$(head -n 1 loud | sed 's/\x1b\[[0-9;]*m//g' | cut -c 1-54)
echo "a worker was killed: $(tail -n 1 said), $(wc -l <loud) line on standard output: \"$start\""
venv/bin/python driver.py quiet >quiet 2>said
echo "the same with _worker_logs_enabled = False: $(tail -n 1 said), $(wc -l <quiet) lines"
[[ $start == "(raylet) A worker died or was killed"* && ! -s quiet ]] || { echo "behaviour has changed"; exit 1; }
