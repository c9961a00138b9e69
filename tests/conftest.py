"""Fixtures of the whole suite: a tiny checkpoint, and one real vLLM server per session (its start takes half
a minute).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import helpers (tiny, push) by name

from support.models import MAX_MODEL_LEN, TOKEN, make_tiny_model
from support.servers import running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random fp32 Qwen2 checkpoint with tied embeddings and a character-level tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True, max_positions=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory) -> Path:
    """The smallest checkpoint there is here, for tests of what a folder must hold. Copy it to change it."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    return make_tiny_model(folder, arch="llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=16)


@pytest.fixture(scope="session")
def server(tiny_model, tmp_path_factory):
    """A running EngineServer of `tiny_model` that writes digests. Tests leave it healthy, with the weights of
    `tiny_model`.
    """
    from megatron_dapo.config import RolloutConfig
    from megatron_dapo.rollout.server import EngineServer

    run_dir = tmp_path_factory.mktemp("run")
    server = EngineServer(
        index=0,
        model=str(tiny_model),
        rollout=RolloutConfig(max_concurrency=64),
        dtype="fp32",
        max_model_len=MAX_MODEL_LEN,
        run_dir=run_dir,
        token=TOKEN,
        seed=0,
        extra_env={"MEGATRON_DAPO_DIGEST_DIR": str(run_dir / "digests")},
    )
    with running(server):
        yield server


@pytest.fixture
async def engine(server):
    """A client of `server`."""
    from megatron_dapo.rollout.client import EngineClient

    client = EngineClient(server.url, TOKEN)
    await client.init_weight_transfer()
    yield client
    await client.close()
