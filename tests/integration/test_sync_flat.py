"""Two hundred weight pushes into one server leave nothing behind, in no process."""

from __future__ import annotations

import asyncio

import pytest
from support.models import TOKEN, make_tiny_model
from support.ranks import run_ranks

from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.server import EngineServer

NUM_PUSHES = 200
# KiB in the second half of the pushes; the model has 3,900, a chunk 195
MOST_GROWN = 4_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pushes_leave_nothing_behind(tmp_path):
    model = make_tiny_model(tmp_path / "model", tied=False, layers=4, hidden=256, heads=8, ffn=256)
    rollout = RolloutConfig(max_concurrency=8)
    server = EngineServer(0, str(model), rollout, "fp32", 128, tmp_path, TOKEN, 0)
    server.start()
    try:
        asyncio.run(server.wait_healthy(400))
        [result, _] = run_ranks(
            "support.jobs_flat:push_many",
            2,
            model=str(model),
            url=server.url,
            token=TOKEN,
            server=server.pid,
            num_pushes=NUM_PUSHES,
            folder=str(tmp_path),
            timeout_s=600,
        )
    finally:
        server.stop()
    looks = result["looks"]
    first, last = looks[0], looks[-1]
    assert (first["version"], last["version"]) == (NUM_PUSHES // 2, NUM_PUSHES)
    print("after half of the pushes:", first, "after all:", last, sep="\n")
    for who in ("rank 0", "rank 1", "server"):
        for what in ("open files", "shared segments", "threads"):
            assert last[who][what] < first[who][what] + 5, (who, what)  # one connection more or less
        assert last[who]["mappings"] < first[who]["mappings"] + 20, who
        assert last[who]["resident"] - first[who]["resident"] < MOST_GROWN, who
