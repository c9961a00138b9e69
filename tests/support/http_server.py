"""A server that answers as a test says, for the client's faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import numpy as np
from aiohttp import web

from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.wire import CONTENT_TYPE, EndFrame, Frame, TokensFrame, encode
from megatron_dapo.types import Completion

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def choice(**changes) -> dict:
    """Two tokens, as vLLM answers."""
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -1.5}]
    values = {"index": 0, "token_ids": [7, 8], "finish_reason": "length", "logprobs": {"content": content}}
    return values | changes


def frame(tokens=(7, 8), logprobs=(-0.5, -1.5), **changes) -> TokensFrame:
    """The same two tokens, as our own route answers."""
    values = {"index": 0, "finish_reason": "length"} | changes
    return TokensFrame(tokens=np.array(tokens, np.int32), logprobs=np.array(logprobs, np.float32), **values)


async def stream(request: web.Request, frames: Iterable[Frame] | bytes) -> web.StreamResponse:
    """Answer with these frames (and an end frame, unless there is an error frame), or with these bytes."""
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
    await response.prepare(request)
    if isinstance(frames, bytes):
        await response.write(frames)
        return response
    frames = list(frames)
    if all(isinstance(one, TokensFrame) for one in frames):
        frames.append(EndFrame(count=len(frames)))
    await response.write(b"".join(encode(one) for one in frames))
    return response


def metrics(tokens: int, running: int = 0) -> str:
    """What vLLM writes of itself, shortened."""
    labels = '{engine="0",model_name="m"}'
    return "\n".join(
        [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            f"vllm:num_requests_running{labels} {float(running)}",
            f"vllm:num_requests_waiting{labels} 1.0",
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0',
            f"vllm:prompt_tokens_total{labels} 10.0",
            f"vllm:generation_tokens_total{labels} {float(tokens)}",
            f"vllm:request_generation_tokens_sum{labels} 99.0",
        ]
    )


async def forever(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def serving(client: dict | None = None, **handlers: Handler) -> AsyncIterator[EngineClient]:
    """A client (with options `client`) of a server with these handlers: generate (in frames), progress,
    partials, json (generate without our own route), metrics, health, reset, pause, resume, abort, update.
    """
    paths = {
        "generate": ("POST", "/megatron_dapo/v1/generate"),
        "progress": ("GET", "/megatron_dapo/v1/progress"),
        "partials": ("GET", "/megatron_dapo/v1/partials"),
        "json": ("POST", "/inference/v1/generate"),
        "pause": ("POST", "/pause"),
        "resume": ("POST", "/resume"),
        "abort": ("POST", "/inference/v1/abort_requests"),
        "metrics": ("GET", "/metrics"),
        "health": ("GET", "/health"),
        "reset": ("POST", "/reset_prefix_cache"),
        "update": ("POST", "/update_weights"),
    }
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_route(*paths[name], handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine = EngineClient(f"http://127.0.0.1:{runner.addresses[0][1]}", "token", **(client or {}))
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


async def generate(engine: EngineClient, n: int = 1) -> list[Completion]:
    """Two tokens of each response, asked of weight version 4."""
    return await engine.generate([10, 20], n=n, max_tokens=2, temperature=1.0, weight_version=4)
