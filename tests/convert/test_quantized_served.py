"""Quantised exports in a real vLLM server, by the kernels that a CPU has: its answers are what the rounded
weights say.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from support.fp8_checkpoints import NO_KERNELS
from support.models import TOKEN
from support.quantised import Exports, dequantised
from support.ranks import TESTS
from support.servers import running

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import make_server
from megatron_dapo.types import Completion

PROMPTS = [[10, 20, 30, 40], [7, 8], [50, 40, 30, 20, 10, 9, 8]]
GAP = 0.1  # nats
# vLLM's kernels for block FP8 ask for AMX, and need AVX-512
EXTENSION = ["--worker-extension-cls", "support.fp8_worker.Extension"]


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
@pytest.mark.parametrize("scheme", ["fp8_block", "int4_awq"])
def test_answers_of_a_server(exports: Exports, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    result = exports.made("llama", scheme)
    options = [
        f"model.path={result.out}",
        "model.dtype=bf16",
        f"run.dir={tmp_path}",
        "rollout.max_concurrency=8",
        "rollout.max_tokens=64",
        "data.max_prompt_tokens=64",
        "rollout.memory_utilization=0.3",
    ]
    if scheme == "fp8_block":
        options.append(f"rollout.extra_args={json.dumps(EXTENSION)}")
    server = make_server(RunConfig.load(None, options), 0, result.out, TOKEN, digests="", load_format="auto")
    with running(server):
        answers = asyncio.run(generate(server.url))
    source = exports.model("llama")
    right = gap(source, dequantised(result.out), answers)
    wrong = gap(source, dequantised(exports.model("llama", seed=1)), answers)
    assert right < GAP < wrong / 3, (right, wrong)


async def generate(url: str) -> list[Completion]:
    client = EngineClient(url, TOKEN)
    try:
        settings = {"n": 1, "max_tokens": 32, "temperature": 0.0, "weight_version": 0}
        return [(await client.generate(prompt, **settings))[0] for prompt in PROMPTS]
    finally:
        await client.close()


def gap(folder: Path, weights: dict[str, torch.Tensor], answers: list[Completion]) -> float:
    """Mean distance of the answers' log-probabilities from those that the weights give their tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights)
    gaps = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([*prompt, *answer.tokens.tolist()])
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        found = logprobs[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]
        gaps.append((found - torch.tensor(answer.logprobs.tolist())).abs())
    return float(torch.cat(gaps).mean())
