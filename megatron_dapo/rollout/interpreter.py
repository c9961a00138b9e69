"""Whether another Python interpreter can run the servers (rollout.python)."""

from __future__ import annotations

import shutil
import subprocess

from megatron_dapo.environment import PLUGIN
from megatron_dapo.errors import UserError

TIMEOUT_S = 300.0  # a first import of vLLM from a network file system takes a minute
PROGRAM = """
import importlib.metadata
import sys
import vllm
import megatron_dapo.rollout.middleware
import megatron_dapo.sync.vllm.plugin
names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
sys.exit(None if sys.argv[1] in names else "vLLM does not see this package as a plugin; install it with pip")
"""


def check_interpreter(python: str) -> None:
    """Start `python` once and import what a server imports. UserError when it cannot."""
    if shutil.which(python) is None:
        raise UserError(f"rollout.python={python} is no program that can be run here; give its whole path")
    try:
        done = subprocess.run(
            [python, "-c", PROGRAM, PLUGIN],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        works = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        works, words = False, str(error)
    if not works:
        raise UserError(
            f"rollout.python={python} cannot run vLLM with this package's plugin ({words}); install vllm and "
            "megatron_dapo there, or set it to null"
        )
