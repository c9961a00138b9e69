"""A server that sleeps gives its GPU's memory back, wakes in two steps, takes weights between them, and
answers as before. Needs a GPU (`TEST_PYTHON=python bash tests/run.sh -m gpu`); the protocol itself is tested
in tests/rollout/test_sleeping.py and, with real servers, in tests/integration/test_sleeping_runs.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from support.models import TOKEN
from support.push import checkpoint, push
from support.servers import running

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import make_server

PROMPTS = [[10, 20, 30, 40], [7, 8], [50, 40, 30, 20, 10, 9, 8]]
GIVEN_BACK = 0.8  # at least, of what the server holds; CUDA's context, buffers and graphs stay


def check(free: dict[str, float]) -> None:
    """Bytes that are free on the GPU: `empty` before the server starts, then by state of it."""
    held = free["empty"] - free["awake"]
    assert held > 0 and free["asleep"] - free["awake"] > GIVEN_BACK * held, free
    assert free["awake"] <= free["weights"] < free["asleep"], free
    assert abs(free["awake again"] - free["awake"]) < (1 - GIVEN_BACK) * held, free


def free_bytes() -> float:
    return torch.cuda.mem_get_info(0)[0]


async def answers(client: EngineClient, version: int) -> list[Any]:
    settings = {"n": 1, "max_tokens": 16, "temperature": 0.0, "weight_version": version}
    return [(await client.generate(prompt, **settings))[0].tokens.tolist() for prompt in PROMPTS]


async def sleep_and_wake(url: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, float], list[Any]]:
    """What is free by state, and the answers before and after."""
    client, free, found = EngineClient(url, TOKEN), {}, []
    try:
        await client.init_weight_transfer()
        await push(client, tensors, 1)
        found.append(await answers(client, 1))
        free["awake"] = free_bytes()
        await client.sleep()
        free["asleep"] = free_bytes()
        await client.wake_up("weights")
        free["weights"] = free_bytes()
        await push(client, tensors, 2)
        await client.wake_up("kv_cache")
        free["awake again"] = free_bytes()
        found.append(await answers(client, 2))
    finally:
        await client.close()
    return free, found


@pytest.mark.gpu
def test_memory_of_a_sleeping_server(tiny_model, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    values = [f"model.path={tiny_model}", "model.dtype=bf16", f"run.dir={tmp_path}", "rollout.sleep=true"]
    values += ["rollout.memory_utilization=0.3", "rollout.max_tokens=64", "data.max_prompt_tokens=64"]
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoint(tiny_model).items()}
    empty = free_bytes()
    with running(make_server(RunConfig.load(None, values), 0, tiny_model, TOKEN, digests="")) as server:
        free, found = asyncio.run(sleep_and_wake(server.url, tensors))
    check({"empty": empty, **free})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("free", "good"),
    [
        ({"empty": 100, "awake": 70, "asleep": 98, "weights": 90, "awake again": 70}, True),
        (
            {"empty": 100, "awake": 70, "asleep": 75, "weights": 73, "awake again": 70},
            False,
        ),  # kept its cache
        ({"empty": 100, "awake": 70, "asleep": 98, "weights": 98, "awake again": 70}, False),  # nothing came
        ({"empty": 100, "awake": 70, "asleep": 98, "weights": 90, "awake again": 40}, False),  # held twice
    ],
)
def test_the_check_itself(free, good):
    if good:
        check(free)
    else:
        with pytest.raises(AssertionError):
            check(free)
