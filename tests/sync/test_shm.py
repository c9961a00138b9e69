"""Weights through shared memory: every rank writes its slices, who maps the memory reads whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import run_ranks
from support.weights import small_model

from megatron_dapo.weights.names import hf_shapes

CASES: dict[str, dict[str, Any]] = {
    "a tensor at a time, tp2 pp2": dict(changes={}, dtype="fp32", tp=2, pp=2, chunk_bytes=1),
    "bf16, tp2 and two ranks without weights": dict(
        changes={"vocab_size": 8}, dtype="bf16", tp=2, pp=1, chunk_bytes=500
    ),
    "tied experts in one chunk, pp2": dict(
        changes={"tied": True, "num_experts": 3, "qk_norm": True, "qkv_bias": False},
        dtype="fp32",
        tp=1,
        pp=2,
        chunk_bytes=1 << 20,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_rank_reads_whole_tensors_of_both_pushes(case):
    names = list(hf_shapes(small_model(**case["changes"])))
    for pushes in run_ranks("support.sync_jobs:walk", 4, **case):
        for version, chunks in zip((3, 4), pushes, strict=True):
            assert [name for chunk in chunks for name in chunk["names"]] == names
            assert {chunk["version"] for chunk in chunks} == {version}
            # whole when it is handed out, and still so when rank 0 has looked at it for a while
            assert [chunk["equal"] for chunk in chunks] == [[True, True]] * len(chunks)
        expected = {1: len(names), 1 << 20: 1}.get(case["chunk_bytes"])
        assert len(chunks) == expected if expected else 1 < len(chunks) < len(names)


def test_a_replica_that_dies_amid_a_push_stops_neither_the_ranks_nor_the_others():
    results = run_ranks("support.sync_jobs:push_while_one_replica_dies", 4)
    assert results[0]["committed"] == ["a", "c"] == results[0]["whole"]
    assert results[0]["failures"] == ["b failed while it received weights: EngineDied: gone"]
    assert results[0]["chunks_of_b"] == list(hf_shapes(small_model())).index(
        "model.layers.0.self_attn.q_proj.weight"
    )
    assert all(result["committed"] == result["failures"] == [] for result in results[1:])
