"""The flagship's script, started with programs that print what they are asked for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from support.launching import AS_FROM_A_TERMINAL, PROGRAMS, SCRIPT, SETTINGS


@pytest.fixture
def launch(tmp_path):
    """Start the script with a `python`, an `srun` and a `scontrol` that print their arguments."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM_")}
    started: list[subprocess.Popen[str]] = []

    def launch(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {**clean, "PATH": f"{tmp_path}:{clean['PATH']}", **environment}
        env["PYTHON"] = str(tmp_path / "python")
        pipe = subprocess.PIPE
        # a shell cannot trap what it was started to ignore, as everything in a script's background is
        command = [sys.executable, "-c", AS_FROM_A_TERMINAL, "bash", str(SCRIPT), *arguments]
        started.append(
            subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return started[-1]

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start(launch):
    """Run the script to its end."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = launch(*arguments, **environment)
        out, error = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    return run
