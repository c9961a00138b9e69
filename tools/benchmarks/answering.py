"""A process that answers as engines do, at once and with random tokens, so that only the receiver costs time.

python -m benchmarks.answering ENGINES TOKENS VOCABULARY     prints one port for each engine
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys

import numpy as np
from aiohttp import web

from megatron_dapo.rollout.wire import CONTENT_TYPE, GENERATE_PATH, EndFrame, TokensFrame, encode

PR_SET_PDEATHSIG = 1


async def main(engines: int, tokens: int, vocabulary: int) -> None:
    chance = np.random.default_rng(0)
    ids = chance.integers(3, vocabulary, tokens, dtype=np.int32)
    logprobs = -chance.exponential(1.0, tokens).astype(np.float32)

    async def generate(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
        await response.prepare(request)
        size = min(tokens, asked["max_tokens"])
        for index in range(asked["n"]):
            frame = TokensFrame(
                index=index, finish_reason="length", tokens=ids[:size], logprobs=logprobs[:size]
            )
            await response.write(encode(frame))
        await response.write(encode(EndFrame(count=asked["n"])))
        await response.write_eof()
        return response

    async def anything(request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    app = web.Application()
    app.router.add_post(GENERATE_PATH, generate)
    app.router.add_route("*", "/{rest:.*}", anything)
    runner = web.AppRunner(app)
    await runner.setup()
    for _ in range(engines):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(*(address[1] for address in runner.addresses), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the benchmark
    asyncio.run(main(*map(int, sys.argv[1:])))
