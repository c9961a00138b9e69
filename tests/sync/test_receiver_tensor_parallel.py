"""Tensor-parallel engines: after an update the shards are those of a fresh server of the same checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from support.models import make_tiny_model
from support.push import checkpoint, push

from megatron_dapo.config import RolloutConfig
from megatron_dapo.environment import DIGEST_VARIABLE
from megatron_dapo.rollout.client import EngineClient, EngineDied
from megatron_dapo.rollout.server import EngineServer

pytestmark = pytest.mark.slow


@asynccontextmanager
async def running(model: Path, run_dir: Path):
    rollout = RolloutConfig(tensor_parallel=2)
    digests = {DIGEST_VARIABLE: str(run_dir / "digests")}
    server = EngineServer(0, str(model), rollout, "fp32", 256, run_dir, "token", 0, digests)
    engine = None
    try:
        server.start()
        await server.wait_healthy(300)
        engine = EngineClient(server.url, "token")
        await engine.init_weight_transfer()
        yield server, engine
    finally:
        if engine:
            await engine.close()
        server.stop()


async def answers(engine: EngineClient) -> list:
    greedy = await engine.generate([10, 20, 30], n=1, max_tokens=40, temperature=0.0, weight_version=0)
    sampled = await engine.generate(
        [10, 20, 30], n=4, max_tokens=40, temperature=1.0, seed=9, weight_version=0
    )
    return [(c.tokens.tolist(), c.logprobs.tolist()) for c in greedy + sampled]


def digests(run_dir: Path, label: str) -> list[dict[str, str]]:
    return [json.loads((run_dir / "digests" / f"tp{rank}-{label}.json").read_text()) for rank in range(2)]


async def test_an_update_equals_a_fresh_server(tmp_path):
    first = make_tiny_model(tmp_path / "first", seed=1)
    second = make_tiny_model(tmp_path / "second", seed=2)
    async with running(second, tmp_path / "fresh") as (_, engine):
        expected = await answers(engine)
    async with running(first, tmp_path / "updated") as (server, engine):
        before = await answers(engine)
        await push(engine, checkpoint(second), version=1)
        after = await answers(engine)
        assert after == expected  # tokens and log-probabilities, bit for bit
        assert before != expected

        assert digests(tmp_path / "updated", "v1") == digests(tmp_path / "fresh", "load")
        rank_0, rank_1 = digests(tmp_path / "updated", "v1")
        replicated = {name for name in rank_0 if rank_0[name] == rank_1[name]}
        assert replicated and all("norm" in name for name in replicated)

        # The rest of the suite kills whole servers; here only the engine inside dies, and the API server
        # lives and has to report it.
        [core] = [p for p in psutil.Process(server.pid).children() if "EngineCore" in " ".join(p.cmdline())]
        os.kill(core.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(EngineDied):
            await answers(engine)
        assert time.monotonic() - start < 10
