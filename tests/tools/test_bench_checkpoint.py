"""`tools/bench.py checkpoint` on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench.py"


@pytest.mark.slow
def test_saves_of_a_tiny_model(tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--folder", tmp_path, "--saves", 1, "--tokens", 16]
    done = subprocess.run(
        [sys.executable, str(TOOL), "checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = (Path(tiny_model) / "model.safetensors").stat().st_size
    assert 4 * weights < found["bytes"] < 5 * weights  # fp32 weights twice, and two moments
    assert 0 < found["blocked_seconds"] <= found["until_complete_seconds"]
    assert found["waiting_seconds"] > 0 and not any(tmp_path.iterdir())
