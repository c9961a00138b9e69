"""The client's clock: a server that makes no token is stalled, one that is slow or paused is not."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web
from support.http_server import choice, forever, frame, generate, metrics, serving, stream

from megatron_dapo.errors import UserError
from megatron_dapo.rollout import client as client_module
from megatron_dapo.rollout.client import (
    EngineStalled,
    RequestFailed,
)
from megatron_dapo.rollout.wire import EndFrame, encode


def counters(tokens: int):
    """Handlers of both ways to say how far the server is."""

    async def progress(request):
        return web.json_response({"tokens": tokens})

    async def loads(request):
        return web.Response(text=metrics(tokens=tokens))

    return {"progress": progress, "metrics": loads}


@pytest.mark.parametrize("route", ["generate", "json"])
async def test_no_progress_ends_all_requests_of_that_server(route):
    options = {"progress_timeout_s": 0.2}
    async with serving(options, **{route: forever}, **counters(5)) as engine:
        began = time.monotonic()
        errors = await asyncio.gather(*(generate(engine) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [EngineStalled] * 3
        assert 0.2 < time.monotonic() - began < 2
        assert "3 requests in flight" in str(errors[0]) and "rollout.progress_timeout_s=0.2" in str(errors[0])


async def test_a_server_whose_counters_do_not_answer_has_no_progress():
    async with serving({"progress_timeout_s": 0.2}, generate=forever, progress=forever) as engine:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineStalled):
            patch.setattr(client_module, "PROBE_TIMEOUT_S", 0.1)
            await generate(engine)


async def test_a_request_may_take_long_while_tokens_come():
    tokens = 0

    async def progress(request):
        nonlocal tokens
        tokens += 1
        return web.json_response({"tokens": tokens})

    async def slow(request):
        await asyncio.sleep(0.8)
        return await stream(request, [frame()])

    async with serving({"progress_timeout_s": 0.2}, generate=slow, progress=progress) as engine:
        assert len(await generate(engine)) == 1


async def test_responses_that_arrive_are_progress_and_nothing_is_asked():
    looks = 0

    async def progress(request):
        nonlocal looks
        looks += 1
        return web.json_response({"tokens": 5})

    async def steady(request):
        response = await stream(request, b"")
        for index in range(12):
            await response.write(encode(frame(index=index)))
            await asyncio.sleep(0.1)
        await response.write(encode(EndFrame(count=12)))
        return response

    async with serving({"progress_timeout_s": 5.0}, generate=steady, progress=progress) as engine:
        assert len(await generate(engine, n=12)) == 12  # more than a second, the time between two looks
    assert looks == 0


async def test_the_clock_of_progress_starts_with_the_first_request():
    async def quick(request):
        await asyncio.sleep(0.1)
        return await stream(request, [frame()])

    async with serving({"progress_timeout_s": 0.3}, generate=quick, **counters(5)) as engine:
        for _ in range(2):
            await asyncio.sleep(0.4)  # idle for longer than the time-out
            await generate(engine)


async def done(request):
    return web.json_response({})


async def test_a_server_that_was_paused_is_not_stalled_and_not_asked():
    looks = 0

    async def progress(request):
        nonlocal looks
        looks += 1
        return web.json_response({"tokens": 5})

    handlers = {"generate": forever, "pause": done, "resume": done, "progress": progress}
    async with serving({"progress_timeout_s": 0.4}, **handlers) as engine:
        request = asyncio.ensure_future(generate(engine))
        while not looks:
            await asyncio.sleep(0.01)
        await engine.pause("keep")
        before = looks
        await asyncio.sleep(0.8)
        assert not request.done() and looks == before
        await engine.resume()
        began = time.monotonic()
        with pytest.raises(EngineStalled):
            await request
        assert time.monotonic() - began > 0.3  # the time-out begins anew


async def test_a_pause_that_begins_while_the_server_is_asked_stops_the_clock_too():
    asked = asyncio.Event()

    async def progress(request):
        asked.set()
        await asyncio.sleep(0.3)
        return web.json_response({"tokens": 5})

    handlers = {"generate": forever, "pause": done, "progress": progress}
    async with serving({"progress_timeout_s": 0.2}, **handlers) as engine:
        request = asyncio.ensure_future(generate(engine))
        await asked.wait()
        await engine.pause("keep")
        await asyncio.sleep(0.5)
        assert not request.done()
        request.cancel()


async def test_while_a_pause_waits_for_requests_they_must_get_on():
    async with serving({"progress_timeout_s": 0.2}, generate=forever, pause=forever, **counters(5)) as engine:
        pausing = asyncio.ensure_future(engine.pause("wait"))
        with pytest.raises(EngineStalled):
            await generate(engine)
        pausing.cancel()
        await asyncio.gather(pausing, return_exceptions=True)


async def test_a_pause_that_fails_stops_no_clock():
    async def broken(request):
        return web.Response(status=500, text="no")

    async with serving({"progress_timeout_s": 0.2}, generate=forever, pause=broken, **counters(5)) as engine:
        with pytest.raises(RequestFailed):
            await engine.pause("keep")
        with pytest.raises(EngineStalled):
            await generate(engine)


async def test_a_server_without_statistics_is_refused_with_words():
    async def nothing(request):
        return web.Response(text="# nothing\n")

    async with serving({"progress_timeout_s": 0.2}, json=forever, metrics=nothing) as engine:
        with pytest.raises(UserError, match="--disable-log-stats"):
            await generate(engine)


async def test_without_our_route_the_server_says_what_runs_and_what_was_sent_since_is_added():
    answer = asyncio.Event()

    async def loads(request):
        return web.Response(text=metrics(tokens=5, running=3))

    async def waits(request):
        await answer.wait()
        return web.json_response({"choices": [choice() | {"index": i} for i in range(8)]})

    async with serving({"progress_timeout_s": 1.0}, json=waits, metrics=loads) as engine:
        first = asyncio.ensure_future(generate(engine, n=8))
        async with asyncio.timeout(2):
            while (running := engine.sequences_on_server()) in (0, 8, None):
                await asyncio.sleep(0.01)
        assert running == 3 + 1  # running and waiting
        second = asyncio.ensure_future(generate(engine, n=8))
        await asyncio.sleep(0)
        assert engine.sequences_on_server() == 4 + 8
        answer.set()
        await asyncio.gather(first, second)


async def test_a_server_that_does_not_answer_a_weight_push_is_given_up():
    async with serving({"progress_timeout_s": 0.1}, update=forever) as engine:
        with pytest.raises(TimeoutError, match="/update_weights did not answer within 0.1 s"):
            await engine.update_weights({})
