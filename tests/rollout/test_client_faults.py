"""The client against servers that misbehave: strange answers, silence, no file descriptors. Both
ways that tokens come are checked alike: in frames, and as vLLM's JSON.
"""

from __future__ import annotations

import asyncio
import errno
import time

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from support.http_server import choice, forever, frame, generate, serving, stream

from megatron_dapo.config import RolloutConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout import server_calls
from megatron_dapo.rollout.client import (
    EngineClient,
    EngineDied,
    RequestFailed,
    RequestRefused,
    file_descriptors_needed,
)
from megatron_dapo.rollout.wire import EndFrame, ErrorFrame, encode
from megatron_dapo.types import Completion

NAN = float("nan")


async def answered(answer, n: int = 1) -> list[Completion]:
    """What the client makes of one JSON choice (a dict), or of frames."""

    async def json_handler(request):
        return web.json_response({"choices": [answer]})

    async def handler(request):
        return await stream(request, answer)

    handlers = {"json": json_handler} if isinstance(answer, dict) else {"generate": handler}
    async with serving(None, **handlers) as engine:
        return await generate(engine, n)


# --- answers


@pytest.mark.parametrize("answer", [choice(), [frame()]], ids=["json", "frames"])
async def test_a_completion_is_made_of_arrays(answer):
    [completion] = await answered(answer)
    assert completion.tokens.dtype == np.int32 and completion.tokens.tolist() == [7, 8]
    assert completion.logprobs.dtype == np.float32 and completion.logprobs.tolist() == [-0.5, -1.5]
    assert completion.trained.dtype == np.bool_ and completion.trained.tolist() == [True, True]
    assert completion.trained.strides == (0,)  # one byte for all tokens
    assert (completion.number, completion.finish_reason, completion.truncated) == (0, "length", True)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([("3", 1), ("4", 1)], ((3, 1), (4, 1))),
        ([("4", 2)], ((4, 2),)),
        ([("default", 2)], ((4, 2),)),
        ([("default", 1), ("4", 1)], ((4, 2),)),
        ([], ((4, 2),)),
    ],
)
async def test_each_token_knows_the_version_that_sampled_it(runs, expected):
    ends = np.cumsum([count for _, count in runs]).tolist()
    labels = [
        {"version": label, "start": end - count, "end": end}
        for (label, count), end in zip(runs, ends, strict=True)
    ]
    for answer in (choice(weight_versions=labels or None), [frame(runs=tuple(runs))]):
        [completion] = await answered(answer)
        assert completion.versions == expected
        assert completion.weight_version == min(version for version, _ in expected)


@pytest.mark.parametrize(
    ("answer", "n", "reason", "words"),
    [
        (choice(logprobs={"content": [{"logprob": -9999.0}] * 2}), 1, "not_a_number", "not numbers"),
        (choice(logprobs={"content": [{"logprob": None}] * 2}), 1, "not_a_number", "not numbers"),
        ([frame(logprobs=(-1.0, NAN))], 1, "not_a_number", "not numbers"),
        ([frame(logprobs=(-1.0, float("-inf")))], 1, "not_a_number", "not numbers"),
        (choice(), 2, "incomplete", "1 completions of 2"),
        ([frame()], 2, "incomplete", "1 completions of 2"),
        ([frame(index=3)], 1, "incomplete", "response 3 of 1"),
        (choice(token_ids=[7, 8, 9]), 1, "incomplete", "3 tokens and 2 log-probabilities"),
        (choice(logprobs=None), 1, "incomplete", "2 tokens and 0 log-probabilities"),
        (choice(token_ids=[], logprobs={"content": []}), 1, "incomplete", "0 tokens"),
        ([frame((), ())], 1, "incomplete", "0 tokens"),
        (choice(finish_reason="abort"), 1, "aborted", "abort"),
        ([frame(finish_reason="abort")], 1, "aborted", "abort"),
        ([frame(finish_reason=None)], 1, "aborted", "None"),
        (encode(frame()), 1, "incomplete", "ends early"),
        (encode(frame())[:-1] + b"?" + encode(EndFrame(count=1)), 1, "incomplete", "checksum"),
        (encode(frame()) + encode(EndFrame(count=2)), 1, "incomplete", "1 responses arrived of 2"),
        ([ErrorFrame(status=500, reason="server_error", text="it broke")], 1, "server_error", "it broke"),
    ],
)
async def test_a_strange_answer_fails_that_request_by_a_reason(answer, n, reason, words):
    with pytest.raises(RequestFailed, match=words) as caught:
        await answered(answer, n)
    assert caught.value.reason == reason


@pytest.mark.parametrize("route", ["generate", "json"])
@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (500, "something broke", RequestFailed),
        (500, "EngineCore encountered an issue", EngineDied),
        (503, "dead", EngineDied),
        (422, "no such field", RequestRefused),
    ],
)
async def test_an_error_status_says_whether_the_request_or_the_engine_is_at_fault(route, status, text, error):
    async def handler(request):
        return web.Response(status=status, text=text)

    async with serving(None, **{route: handler}) as engine:
        with pytest.raises(error, match=text) as caught:
            await generate(engine)
    assert type(caught.value) is error
    assert isinstance(caught.value, UserError) == (error is RequestRefused)


async def test_an_engine_that_dies_while_it_answers_is_dead():
    with pytest.raises(EngineDied, match="EngineCore encountered"):
        text = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        await answered([frame(), ErrorFrame(status=503, reason="engine_died", text=text)], n=2)


async def test_a_server_that_dies_while_it_answers_is_dead():
    async def handler(request):
        response = await stream(request, encode(frame()))
        assert request.transport is not None
        request.transport.abort()
        return response

    async with serving(generate=handler) as engine:
        with pytest.raises(EngineDied, match="is gone"):
            await generate(engine)


# --- connections


async def test_nobody_there_is_a_dead_engine():
    engine = EngineClient("http://127.0.0.1:9", "token")
    with pytest.raises(EngineDied, match="127.0.0.1:9"):
        await generate(engine)
    with pytest.raises(EngineDied):
        await engine.health()
    await engine.close()
    await engine.close()


async def test_closing_the_client_ends_its_requests():
    async with serving(generate=forever) as engine:
        requests = [asyncio.ensure_future(generate(engine)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await engine.close()
        errors = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 2)
        assert [type(error) for error in errors] == [EngineDied] * 3


@pytest.mark.parametrize("route", ["generate", "json"])
async def test_cancelling_a_request_closes_its_connection(route):
    ended = asyncio.Event()

    async def handler(request):
        try:
            return await forever(request)
        finally:
            ended.set()

    async with serving(None, **{route: handler}) as engine:
        request = asyncio.ensure_future(generate(engine))
        await asyncio.sleep(0.1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert engine.sequences_on_server() in (0, None)
        await engine.close()
        assert engine._watching is not None
        await asyncio.wait({engine._watching}, timeout=2)
        assert engine._watching.done()


async def test_only_requests_that_may_be_made_twice_use_a_connection_again():
    """After an exception a server drops the connection without saying so, and the next request finds out."""
    ports = []

    async def handler(request):
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername")[1])
        if request.path == "/reset_prefix_cache":
            return web.json_response({"success": True})
        return await stream(request, [frame()])

    async with serving(generate=handler, reset=handler) as engine:
        for _ in range(2):
            await generate(engine)
        for _ in range(2):
            await engine.reset_prefix_cache()
    assert ports[0] == ports[1] and len(set(ports)) == 3


@pytest.mark.parametrize("path", ["generate", "json"])
async def test_a_connection_that_was_dropped_meanwhile_is_no_dead_engine(path):
    asked = 0

    async def handler(request):
        nonlocal asked
        asked += 1
        if asked == 2:
            assert request.transport is not None
            request.transport.abort()
        if path == "json":
            return web.json_response({"choices": [choice()]})
        return await stream(request, [frame()])

    async with serving(None, **{path: handler}) as engine:
        for _ in range(2):
            assert len(await generate(engine)) == 1
    assert asked == 3


async def test_a_health_probe_takes_at_most_ten_seconds(monkeypatch):
    assert server_calls.PROBE_TIMEOUT_S == 10.0
    monkeypatch.setattr(server_calls, "PROBE_TIMEOUT_S", 0.1)
    async with serving(health=forever) as engine:
        began = time.monotonic()
        assert await engine.health() is False
        assert time.monotonic() - began < 2


async def test_a_first_token_that_does_not_come_is_a_time_out():
    async with serving(generate=forever) as engine:
        with pytest.raises(TimeoutError, match=r"did not generate a first token within 0\.1 s"):
            await engine.warm_up(0.1)


async def test_waiting_until_idle_has_an_end():
    answers = [False, False, True]

    async def reset(request):
        return web.json_response({"success": answers.pop(0)})

    async with serving(reset=reset) as engine:
        await engine.wait_idle()
        answers[:] = [False] * 1000
        with pytest.raises(RequestFailed, match="requests are running"):
            await engine.wait_idle(timeout_s=0.1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_no_file_descriptor_left_is_not_a_dead_engine(monkeypatch, number):
    def no_socket(*args, **kwargs):
        raise OSError(number, "Too many open files")

    async with serving(health=forever) as engine:
        monkeypatch.setattr(aiohttp.connector.aiohappyeyeballs, "start_connection", no_socket)
        with pytest.raises(UserError, match=r"ulimit -n.*rollout\.max_concurrency") as caught:
            await generate(engine)
        assert isinstance(caught.value.__cause__, aiohttp.ClientConnectorError)


def test_each_sequence_in_flight_may_need_a_connection():
    """2 engines of 100 sequences and 4 other calls each, beside 256 files of the process itself."""
    assert file_descriptors_needed(RolloutConfig(engines=2, max_concurrency=100)) == 256 + 2 * 104
