"""`tools/bench.py checkpoint` on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_saves_of_a_tiny_model(bench_process, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--folder", tmp_path, "--saves", 1, "--tokens", 16]
    found = bench_process("checkpoint", *arguments)
    weights = (Path(tiny_model) / "model.safetensors").stat().st_size
    assert 4 * weights < found["bytes"] < 5 * weights  # fp32 weights twice, and two moments
    assert 0 < found["blocked_seconds"] <= found["until_complete_seconds"]
    assert found["waiting_seconds"] > 0 and not any(tmp_path.iterdir())
