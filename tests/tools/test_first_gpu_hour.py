"""tools/first_gpu_hour.sh with stand-ins for its checks' commands: order, failures, report, a later start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHECKS = yaml.safe_load((ROOT / "tools/first_hour/checks.yaml").read_text())

STAND_INS = [
    {"name": "first", "command": 'for i in $(seq 50); do echo "line $i"; done; echo one >> "$OUT/../order"'},
    {"name": "wrong", "command": 'echo two >> "$OUT/../order"; echo broken >&2; exit 3'},
    {"name": "slow", "minutes": 0.01, "command": "echo begun; sleep 60"},
    {"name": "large", "gpus": 8, "command": "echo never"},
    {"name": "idle", "command": 'echo "3 skipped, 7 deselected in 0.1s"'},
    {"name": "last", "command": 'echo three >> "$OUT/../order"; $PYTHON -c "import megatron_dapo.errors"'},
]


@pytest.fixture
def hour(tmp_path):
    """hour(*arguments) -> what the script did, with stand-ins for its checks and 2 GPUs by default."""
    checks = tmp_path / "checks.yaml"
    defaults = {"gpus": 1, "minutes": 1, "expected": "as it is", "remedy": "mend it", "twin": "echo twin"}
    checks.write_text(yaml.safe_dump([defaults | check for check in STAND_INS]))
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        '#!/bin/sh\nif [ "$1" = -L ]; then printf "GPU 0: H\\nGPU 1: H\\n"; else echo "H200, 1 MiB, 5"; fi\n'
    )
    smi.chmod(0o755)

    def run(*arguments: str, gpus: bool = True, stand_ins: bool = True) -> subprocess.CompletedProcess[str]:
        path = (f"{smi.parent}:" if gpus else "") + os.environ["PATH"]
        return subprocess.run(
            ["bash", str(ROOT / "tools/first_gpu_hour.sh"), "--out", str(tmp_path / "out"), *arguments]
            + (["--checks", str(checks)] if stand_ins else []),
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PATH": path, "PYTHON": sys.executable},
        )

    return run


def verdicts(folder: Path) -> dict[str, str]:
    return {
        entry["name"]: entry["verdict"] for entry in json.loads((folder / "out/results.json").read_text())
    }


def test_all_checks_run_and_are_reported(hour, tmp_path):
    done = hour()
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "out/order").read_text().split() == ["one", "two", "three"]
    assert verdicts(tmp_path) == {
        "first": "passed",
        "wrong": "failed",
        "slow": "timed out",
        "large": "skipped",
        "idle": "skipped",
        "last": "passed",
    }
    report = (tmp_path / "out/report.md").read_text()
    assert "- GPU 0: H200, 1 MiB, 5" in report and "- torch " in report and "- megatron-core " in report
    assert "| wrong | failed | 0 |" in report and "needs 8 GPUs" in report
    assert "broken" in report and "If not: mend it" in report
    assert "line 50" in report and "line 11" in report and "line 10\n" not in report  # the last 40 lines
    assert "[first hour] last: passed" in done.stdout


def test_a_later_start_goes_on(hour, tmp_path):
    hour("--gpus", "1")
    done = hour("--from", "idle")
    assert done.returncode == 1  # of what is known
    assert list(verdicts(tmp_path)) == ["first", "wrong", "slow", "large", "idle", "last"]
    assert (tmp_path / "out/order").read_text().split() == ["one", "two", "three", "three"]
    done = hour("--from", "nowhere")
    assert done.returncode == 2 and "--from nowhere must be one of first, wrong" in done.stderr


def test_twins_run_without_gpus(hour, tmp_path):
    done = hour("--twins", gpus=False)
    assert done.returncode == 0, done.stdout
    assert set(verdicts(tmp_path).values()) == {"passed"}
    assert "twins on a CPU" in (tmp_path / "out/report.md").read_text()


def test_without_a_gpu_it_says_so(hour, tmp_path):
    done = hour(gpus=False)
    assert done.returncode == 2 and "no GPU" in done.stderr and not (tmp_path / "out").exists()
    done = hour("--dry-run", gpus=False, stand_ins=False)
    assert done.returncode == 0 and "no GPU" in done.stdout
    found = [line.split()[1] for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert found == [check["name"] for check in CHECKS]
    assert found[0] == "doctor" and {"parity", "fp8_recipes", "ipc", "sleep", "tiny_run", "qwen7b"} <= set(
        found
    )
    assert "$PYTEST" in done.stdout
    assert "$PYTEST" not in hour("--list", gpus=False, stand_ins=False).stdout


def test_what_the_checks_name_is_there():
    for check in CHECKS:
        words = f"{check['command']} {check.get('twin', '')}".split()
        files = [word for word in words if word.startswith(("tests/", "tools/", "examples/"))]
        assert files and not [name for name in files if not (ROOT / name).exists()], check["name"]
    names = " ".join(check["command"] for check in CHECKS)
    marked = [p for p in (ROOT / "tests/gpu").glob("test_*.py") if "mark.gpu" in p.read_text()]
    assert not [path.name for path in marked if path.name not in names]  # every test of a GPU is in a check
