"""`tools/bench.py convert`: the model is as large as it says, and every number is there."""

from __future__ import annotations

import importlib

import pytest


def test_the_model_is_as_large_as_was_asked_for(bench, tmp_path, monkeypatch):
    benchmark = importlib.import_module("benchmarks.convert")
    monkeypatch.setattr(benchmark, "EMBEDDING_BYTES", 1000 * 1536 * 2)
    monkeypatch.setattr(benchmark, "VOCABULARY", 1000)
    model = benchmark.make_model(tmp_path / "model", 0.1)
    assert (model / "model.safetensors").stat().st_size == pytest.approx(0.1e9, rel=0.05)


@pytest.mark.slow
def test_both_ways_beside_a_copy(bench, tmp_path):
    found = bench("convert", "--gigabytes", "0.6", "--repeats", "1", "--folder", str(tmp_path))
    assert 0.5e9 < found["bytes"] < 0.7e9 and not list(tmp_path.iterdir())
    for way in ("hf_to_megatron", "megatron_to_hf"):
        assert found[f"{way}_seconds"] > 0 and found[f"{way}_over_copy"] > 0
        assert found[f"{way}_peak_extra_bytes"] < found["largest_tensor_bytes"] + (128 << 20)
