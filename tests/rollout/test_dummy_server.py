"""A real server that another interpreter runs (rollout.python), and that starts with dummy weights
(rollout.load_format) and sleeps: after a push it answers as one that has read the checkpoint. It ends with
the process that started it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support.models import MAX_MODEL_LEN, TOKEN
from support.push import checkpoint, push
from support.servers import group_members, wait_until_gone

from megatron_dapo.rollout.client import EngineClient, EngineDied
from megatron_dapo.rollout.errors import RequestFailed

PROMPT = [10, 20, 30, 40, 50]
OWNER = """
import asyncio, sys, time
from pathlib import Path
from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.server import EngineServer

model, folder, token, python, longest = sys.argv[1:]
rollout = RolloutConfig(max_concurrency=64, python=python)
server = EngineServer(1, model, rollout, "fp32", int(longest), Path(folder), token, 0, load_format="dummy")
server.start()
print(server.pid, server.url, flush=True)
asyncio.run(server.wait_healthy(300))
print("healthy", flush=True)
time.sleep(10_000)
"""


def make_venv(folder: Path) -> str:
    """The interpreter of a virtual environment with the packages of this one."""
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    [mine] = [path for path in site.getsitepackages() if path in sys.path]
    (packages / "mine.pth").write_text(f"import site; site.addsitedir({mine!r})\n")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def dummy(tiny_model, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server and the process that started it, which the last test of this file kills."""
    folder = tmp_path_factory.mktemp("dummy")
    python = make_venv(folder / "venv")
    arguments = [str(tiny_model), str(folder), TOKEN, python, str(MAX_MODEL_LEN)]
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *arguments], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    pid, url = owner.stdout.readline().split()
    try:
        assert owner.stdout.readline().strip() == "healthy"
        yield SimpleNamespace(owner=owner, pid=int(pid), url=url, python=python)
    finally:
        owner.kill()
        owner.wait()
        for left in group_members(int(pid)):
            os.kill(left, signal.SIGKILL)


async def outputs(engine: EngineClient) -> list:
    """Greedy and seeded, of one prompt."""
    greedy = {"n": 1, "max_tokens": 24, "temperature": 0.0}
    seeded = {"n": 4, "max_tokens": 24, "temperature": 1.0, "seed": 5}
    found = [await engine.generate(PROMPT, weight_version=0, **how) for how in (greedy, seeded)]
    return [(c.tokens.tolist(), c.logprobs.tolist()) for completions in found for c in completions]


async def test_after_a_push_it_answers_as_a_server_that_loaded(engine, dummy, tiny_model):
    assert psutil.Process(dummy.pid).cmdline()[0] == dummy.python
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


async def test_killing_the_trainer_ends_its_servers(dummy):
    """kill -9 of the process that owns a server, while it generates: nothing is left, and the client says so
    at once.
    """
    assert len(group_members(dummy.pid)) >= 3  # API server, engine core, worker
    engine = EngineClient(dummy.url, TOKEN)
    long = {"n": 8, "max_tokens": 1000, "temperature": 1e-3, "seed": 0, "weight_version": 0}
    generating = asyncio.create_task(engine.generate(PROMPT, **long))
    done, _ = await asyncio.wait([generating], timeout=0.5)
    assert not done
    killed_at = time.monotonic()
    dummy.owner.kill()
    with pytest.raises(EngineDied, match=dummy.url):
        await asyncio.wait_for(generating, 10)
    assert time.monotonic() - killed_at < 3
    await engine.close()
    wait_until_gone(dummy.pid, 10)
