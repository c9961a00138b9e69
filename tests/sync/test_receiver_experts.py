"""Weight updates of a model with experts, which vLLM packs for its kernel: it computes with the new ones."""

from __future__ import annotations

import json

import pytest
import torch
from support import reference
from support.models import TOKEN, make_tiny_model
from support.push import checkpoint, push

from megatron_dapo.config import RolloutConfig
from megatron_dapo.environment import DIGEST_VARIABLE
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import EngineServer
from megatron_dapo.types import Completion

PROMPT = [10, 20, 30, 40]


def gap(model: torch.nn.Module, completion: Completion) -> float:
    """Largest distance of the engine's log-probabilities from those of transformers, nats."""
    tokens = torch.tensor([*PROMPT, *completion.tokens])
    with torch.no_grad():
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
    return float((logprobs[len(PROMPT) - 1 :] - torch.tensor(completion.logprobs)).abs().max())


@pytest.mark.parametrize("tensor_parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_packed_experts_follow_every_update(tmp_path, tensor_parallel):
    first, second = (
        make_tiny_model(tmp_path / str(seed), arch="qwen3_moe", ffn=64, seed=seed) for seed in (1, 2)
    )
    models = {folder: reference.load(folder, torch.float32) for folder in (first, second)}
    digests = tmp_path / "digests"
    rollout = RolloutConfig(tensor_parallel=tensor_parallel)
    server = EngineServer(
        0, str(first), rollout, "fp32", 256, tmp_path, TOKEN, 0, {DIGEST_VARIABLE: str(digests)}
    )
    server.start()
    try:
        await server.wait_healthy(300)
        engine = EngineClient(server.url, TOKEN)
        await engine.init_weight_transfer()
        for version, held in enumerate((first, second, first)):
            if version:
                await push(engine, checkpoint(held), version)
            completions = await engine.generate(
                PROMPT, n=4, max_tokens=40, temperature=1.0, seed=3, weight_version=version
            )
            for completion in completions:
                assert gap(models[held], completion) < 1e-4
                assert gap(models[first if held == second else second], completion) > 0.5
        await engine.close()
    finally:
        server.stop()
    for rank in range(tensor_parallel):
        loaded, other, again = (
            json.loads((digests / f"tp{rank}-{at}.json").read_text()) for at in ("load", "v1", "v2")
        )
        assert loaded == again and all(loaded[name] != other[name] for name in loaded)
