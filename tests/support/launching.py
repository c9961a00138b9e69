"""Programs and variables for tests of the flagship's script: they print what it starts; nothing trains."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "run_qwen32b_dapo.sh"
CONFIG = ROOT / "examples" / "configs" / "qwen32b.yaml"
SETTINGS = (
    *("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "MEGATRON_DAPO_ROOT"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CONFIG", "SERVING_NODES", "PREFLIGHT"),
    *("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_RUNTIME", "CONTAINER_WORKDIR"),
)


AS_FROM_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Preflight, which ends as PREFLIGHT_ENDS says, and both ranks of a torchrun that runs until each was told to
# stop; the file says that they are ready.
TORCHRUN = """#!/bin/sh
echo python "$@"
case $* in *--deep) echo of preflight >&2; exit ${PREFLIGHT_ENDS:-0} ;; esac
if [ -n "$RANKS_READY" ]; then
  for rank in 0 1; do
    sh -c 'trap "echo saved; exit 0" TERM; echo > "$RANKS_READY.$0"; while :; do sleep 0.05; done' $rank &
  done
  wait
  wait
fi
"""
# srun on one node: it passes USR1 on to its task, the script, and that alone.
SRUN = """#!/bin/bash
echo srun "$@"
case $* in *--preflight-only*) exit ${PREFLIGHT_ENDS:-0} ;; esac
if [ -n "$RANKS_READY" ]; then
  while [ "$1" != bash ]; do shift; done
  SLURM_STEP_ID=0 "$@" &
  task=$!
  trap 'kill -USR1 $task' USR1
  wait $task
  wait $task
fi
"""
PROGRAMS = {
    "python": TORCHRUN,
    "srun": SRUN,
    "scontrol": """#!/bin/sh
if [ $1 = show ]; then printf 'host7\\nhost8\\n'; else echo scontrol "$@"; fi
""",
}


# The variables of a job on two nodes; in its batch script, in a shell inside salloc, and in a step of its own
# (srun --pty bash), where a step is known by its number.
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "host[7-8]",
    "SLURM_CPUS_ON_NODE": "96",
}
PLACES = {"batch": {}, "salloc": {"SLURM_STEP_ID": "4294967290"}, "pty": {"SLURM_STEP_ID": "0"}}


ASYNC = {"CONFIG": "qwen32b_async", "NNODES": "16", "MASTER_ADDR": "host0", "GLOO_SOCKET_IFNAME": "eth0"}


ONE = {**JOB, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
IMAGE = {"CONTAINER_IMAGE": "dapo:1", "CONTAINER_MOUNTS": "/data:/data,/models:/m:ro"}


def plan(found: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The lines of the script's own part of a dry run, by their title."""
    assert found.returncode == 0, found.stderr
    lines = [line[2:] for line in found.stdout.splitlines() if line.startswith("# ") and ": " in line]
    return dict(line.split(": ", 1) for line in lines)


def ready(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.with_name(f"ready.{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
