"""A real server that another interpreter runs (rollout.python), and that starts with dummy weights
(rollout.load_format) and sleeps: after a push it answers as one that has read the checkpoint.
"""

from __future__ import annotations

import asyncio
import site
import sys
import venv
from pathlib import Path

import psutil
import pytest
from support.models import MAX_MODEL_LEN, TOKEN
from support.push import checkpoint, push
from support.servers import running

from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.rollout.server import EngineServer

PROMPT = [10, 20, 30, 40, 50]


def make_venv(folder: Path) -> str:
    """The interpreter of a virtual environment with the packages of this one."""
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    [mine] = [path for path in site.getsitepackages() if path in sys.path]
    (packages / "mine.pth").write_text(f"import site; site.addsitedir({mine!r})\n")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def dummy(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dummy")
    server = EngineServer(
        index=1,
        model=str(tiny_model),
        rollout=RolloutConfig(max_concurrency=64, python=make_venv(folder / "venv")),
        dtype="fp32",
        max_model_len=MAX_MODEL_LEN,
        run_dir=folder,
        token=TOKEN,
        seed=0,
        load_format="dummy",
    )
    with running(server):
        yield server


async def outputs(engine: EngineClient) -> list:
    """Greedy and seeded, of one prompt."""
    greedy = {"n": 1, "max_tokens": 24, "temperature": 0.0}
    seeded = {"n": 4, "max_tokens": 24, "temperature": 1.0, "seed": 5}
    found = [await engine.generate(PROMPT, weight_version=0, **how) for how in (greedy, seeded)]
    return [(c.tokens.tolist(), c.logprobs.tolist()) for completions in found for c in completions]


async def test_after_a_push_it_answers_as_a_server_that_loaded(engine, dummy, tiny_model):
    assert psutil.Process(dummy.pid).cmdline()[0] == dummy._rollout.python
    loaded = await outputs(engine)
    client = EngineClient(dummy.url, TOKEN)
    try:
        await client.warm_up(60)
        await client.init_weight_transfer()
        assert await outputs(client) != loaded
        await push(client, checkpoint(tiny_model), version=1)
        assert await outputs(client) == loaded

        await client.sleep()
        assert await client.health()
        waits = asyncio.create_task(outputs(client))
        await client.wake_up("weights")
        await push(client, checkpoint(tiny_model), version=2)
        assert not waits.done()
        await client.wake_up("kv_cache")
        assert await waits == loaded
        with pytest.raises(RequestFailed, match="is awake, not sleeping, after its weights were woken"):
            await client.wake_up("weights")
    finally:
        await client.close()
