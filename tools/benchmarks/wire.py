"""Tokens from one real server: what they cost its processes and the client's, over either route."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from aiohttp.client_proto import ResponseHandler

from benchmarks.runs import make_model, run_config, write_problems
from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import EngineServer, make_server

PROMPT = list(range(5, 15))
# One layer: the engine is not what is measured.
SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_window_layers": 1}
API_BUDGET_US = 2.0


def measure(*, prompts: int, samples: int, tokens: int) -> dict[str, Any]:
    """`prompts` requests at once for `samples` responses of `tokens` tokens each, over each route."""
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        make_model(folder / "model", longest=len(PROMPT) + tokens, sizes=SIZES)
        write_problems(folder / "data.jsonl")
        settings = {
            "rollout.max_tokens": tokens,
            "rollout.max_concurrency": prompts * samples,
            "data.max_prompt_tokens": len(PROMPT),
        }
        config = run_config(folder, model="model", name="run", settings=settings, overrides=())
        routes = asyncio.run(_both_routes(config, folder / "model", prompts, samples, tokens))
    ours, json_route = routes["ours"], routes["json"]
    return {
        "api_process_us_per_token": {
            "value": ours["api_us"],
            "budget": API_BUDGET_US,
            "json": json_route["api_us"],
        },
        "engine_us_per_token": {"value": ours["engine_us"], "json": json_route["engine_us"]},
        "client_us_per_token": {"value": ours["client_us"], "json": json_route["client_us"]},
        "bytes_per_token": {"value": ours["bytes"], "json": json_route["bytes"]},
        "tokens_per_second": {"value": ours["tokens_per_second"], "json": json_route["tokens_per_second"]},
        "tokens": prompts * samples * tokens,
    }


async def _both_routes(
    config: RunConfig, model: Path, prompts: int, samples: int, tokens: int
) -> dict[str, dict[str, float]]:
    server = make_server(config, 0, model, "bench", digests="", load_format="auto")
    server.start()
    try:
        await server.wait_healthy(config.rollout.start_timeout_s)
        return {
            route: await _one_route(server, route, prompts, samples, tokens) for route in ("ours", "json")
        }
    finally:
        server.stop()


async def _one_route(
    server: EngineServer, route: str, prompts: int, samples: int, tokens: int
) -> dict[str, float]:
    client = EngineClient(server.url, "bench")
    if route == "json":
        client._in_frames = False  # as if the server had answered that it has no such route
    try:
        await _generate(client, prompts, samples, min(tokens, 8))  # connections, first use of the code
        assert server.pid is not None
        api = psutil.Process(server.pid)
        with received_bytes() as received:
            before, began, mine = _seconds(api), time.perf_counter(), time.process_time()
            count = await _generate(client, prompts, samples, tokens)
            mine, wall = time.process_time() - mine, time.perf_counter() - began
            after = _seconds(api)
    finally:
        await client.close()
    return {
        "api_us": round((after[0] - before[0]) * 1e6 / count, 3),
        "engine_us": round((after[1] - before[1]) * 1e6 / count, 3),
        "client_us": round(mine * 1e6 / count, 3),
        "bytes": round(received[0] / count, 2),
        "tokens_per_second": round(count / wall, 1),
    }


async def _generate(client: EngineClient, prompts: int, samples: int, tokens: int) -> int:
    """Ask for all responses at once; the number of tokens that came."""
    asked = (
        client.generate(PROMPT, n=samples, max_tokens=tokens, temperature=1.0, seed=i, weight_version=0)
        for i in range(0, prompts * samples, samples)
    )
    answers = await asyncio.gather(*asked)
    return sum(len(completion.tokens) for answer in answers for completion in answer)


def _seconds(api: psutil.Process) -> tuple[float, float]:
    """Processor time of the process that speaks HTTP, and of all that it has started."""

    def of(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    return of(api), sum(of(child) for child in api.children(recursive=True))


@contextmanager
def received_bytes() -> Iterator[list[int]]:
    """Counts what arrives on the HTTP connections of this process, headers included."""
    total, take = [0], ResponseHandler.data_received

    def count(self: ResponseHandler, data: bytes) -> None:
        total[0] += len(data)
        take(self, data)

    ResponseHandler.data_received = count
    try:
        yield total
    finally:
        ResponseHandler.data_received = take
