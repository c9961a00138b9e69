"""`tools/bench.py delta`: shares by hand. The slow test makes updates of a tiny model."""

from __future__ import annotations

import importlib
import json

import pytest
import torch


def test_shares_by_hand(bench):
    ends = importlib.import_module("benchmarks.delta").Ends(message_bytes=2000)
    weights = torch.ones(1500, dtype=torch.bfloat16)  # parcels of 1000 and 500 elements
    first = ends.push(weights.view(torch.uint8))
    assert first["bytes_over_full"] == 1
    weights[[7, 8, 1200]] = 1.0078125  # the next bf16 number
    again = ends.push(weights.view(torch.uint8))
    assert again["changed"] == 3 / 1500
    # two headers; gaps 7 and 0; gap 200; a byte for each step
    assert again["bytes_over_full"] == (24 + 2 + 2 + 24 + 1 + 1) / 3000
    assert min(again["sender"], again["receiver"], again["memcpy"]) >= 0


@pytest.mark.slow
def test_updates_of_a_tiny_model(bench_process, tiny_model, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"prompt": f"{i} + {i} is {2 * i}\u2028"}) + "\n" for i in range(400))
    )
    arguments = [
        "--model",
        tiny_model,
        "--texts",
        texts,
        "--warmup",
        "1",
        "--updates",
        "2",
        "--tokens",
        "256",
    ]
    found = bench_process("delta", *arguments, "optimizer.lr=1e-5")
    assert found["lr"] == 1e-5 and found["elements"] > 100_000
    assert len(found["changed"]) == len(found["bytes_over_full"]) == 2
    assert all(0 < share < 0.2 for share in (*found["changed"], *found["bytes_over_full"]))
    assert found["sender_seconds_per_gb"] > 0 and found["receiver_seconds_per_gb"] > 0
    assert found["memcpy_seconds_per_gb"] > 0 and found["break_even_gb_per_second"] > 0
