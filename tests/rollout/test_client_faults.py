"""The client against servers that misbehave: strange answers, silence, no progress, no file descriptors."""

from __future__ import annotations

import asyncio
import errno
import time

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from support.http_server import choice, forever, metrics, serving

from megatron_dapo.config import RolloutConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout import client as client_module
from megatron_dapo.rollout.client import (
    EngineClient,
    EngineDied,
    EngineStalled,
    RequestFailed,
    RequestRefused,
    file_descriptors_needed,
)
from megatron_dapo.types import Completion


async def generate(engine: EngineClient, n: int = 1) -> list[Completion]:
    return await engine.generate([10, 20], n=n, max_tokens=2, temperature=1.0, weight_version=4)


async def answered(answer: dict, n: int = 1) -> list[Completion]:
    """What the client makes of one choice."""

    async def handler(request):
        return web.json_response({"choices": [answer]})

    async with serving(generate=handler) as engine:
        return await generate(engine, n)


# --- answers


async def test_a_completion_is_made_of_arrays():
    [completion] = await answered(choice())
    assert completion.tokens.dtype == np.int32 and completion.tokens.tolist() == [7, 8]
    assert completion.logprobs.dtype == np.float32 and completion.logprobs.tolist() == [-0.5, -1.5]
    assert completion.trained.tolist() == [True, True]
    assert (completion.number, completion.finish_reason, completion.truncated) == (0, "length", True)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([("3", 0, 1), ("4", 1, 2)], ((3, 1), (4, 1))),
        ([("4", 0, 2)], ((4, 2),)),
        ([("default", 0, 2)], ((4, 2),)),
        (None, ((4, 2),)),
    ],
)
async def test_each_token_knows_the_version_that_sampled_it(spans, expected):
    labels = spans and [{"version": version, "start": start, "end": end} for version, start, end in spans]
    [completion] = await answered(choice(weight_versions=labels))
    assert completion.versions == expected
    assert completion.weight_version == min(version for version, _ in expected)


NAN = [{"logprob": -9999.0}, {"logprob": -1.0}]


@pytest.mark.parametrize(
    ("answer", "n", "reason", "words"),
    [
        (choice(logprobs={"content": NAN}), 1, "not_a_number", "not numbers"),
        (choice(logprobs={"content": [{"logprob": None}] * 2}), 1, "not_a_number", "not numbers"),
        (choice(), 2, "incomplete", "1 completions of 2"),
        (choice(token_ids=[7, 8, 9]), 1, "incomplete", "3 tokens, 2 log-probabilities"),
        (choice(token_ids=[], logprobs={"content": []}), 1, "incomplete", "0 tokens"),
        (choice(finish_reason="abort"), 1, "aborted", "abort"),
    ],
)
async def test_a_strange_answer_fails_that_request_by_a_reason(answer, n, reason, words):
    with pytest.raises(RequestFailed, match=words) as caught:
        await answered(answer, n)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (500, "something broke", RequestFailed),
        (500, "EngineCore encountered an issue", EngineDied),
        (503, "dead", EngineDied),
        (422, "no such field", RequestRefused),
    ],
)
async def test_an_error_status_says_whether_the_request_or_the_engine_is_at_fault(status, text, error):
    async def handler(request):
        return web.Response(status=status, text=text)

    async with serving(generate=handler) as engine:
        with pytest.raises(error, match=text) as caught:
            await generate(engine)
    assert type(caught.value) is error
    assert isinstance(caught.value, UserError) == (error is RequestRefused)


# --- progress


async def test_no_progress_ends_all_requests_of_that_server():
    async def counters(request):
        return web.Response(text=metrics(tokens=5))

    async with serving({"progress_timeout_s": 0.2}, generate=forever, metrics=counters) as engine:
        began = time.monotonic()
        errors = await asyncio.gather(*(generate(engine) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [EngineStalled] * 3
        assert 0.2 < time.monotonic() - began < 2
        assert "3 requests in flight" in str(errors[0]) and "rollout.progress_timeout_s=0.2" in str(errors[0])


async def test_a_server_whose_counters_do_not_answer_has_no_progress():
    async with serving({"progress_timeout_s": 0.2}, generate=forever, metrics=forever) as engine:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineStalled):
            patch.setattr(client_module, "PROBE_TIMEOUT_S", 0.1)
            await generate(engine)


async def test_a_request_may_take_long_while_tokens_come():
    tokens = 0

    async def counters(request):
        nonlocal tokens
        tokens += 1
        return web.Response(text=metrics(tokens=tokens))

    async def slow(request):
        await asyncio.sleep(0.8)
        return web.json_response({"choices": [choice()]})

    async with serving({"progress_timeout_s": 0.2}, generate=slow, metrics=counters) as engine:
        assert len(await generate(engine)) == 1


async def test_the_clock_of_progress_starts_with_the_first_request():
    async def counters(request):
        return web.Response(text=metrics(tokens=5))

    async def quick(request):
        await asyncio.sleep(0.1)
        return web.json_response({"choices": [choice()]})

    async with serving({"progress_timeout_s": 0.3}, generate=quick, metrics=counters) as engine:
        for _ in range(2):
            await asyncio.sleep(0.4)  # idle for longer than the time-out
            await generate(engine)


async def test_a_server_without_statistics_is_refused_with_words():
    async def nothing(request):
        return web.Response(text="# nothing\n")

    async with serving({"progress_timeout_s": 0.2}, generate=forever, metrics=nothing) as engine:
        with pytest.raises(UserError, match="--disable-log-stats"):
            await generate(engine)


async def test_what_the_server_runs_is_its_last_word_and_what_was_sent_since():
    answer = asyncio.Event()

    async def counters(request):
        return web.Response(text=metrics(tokens=5, running=3))

    async def waits(request):
        await answer.wait()
        return web.json_response({"choices": [choice() | {"index": i} for i in range(8)]})

    async with serving({"progress_timeout_s": 1.0}, generate=waits, metrics=counters) as engine:
        assert engine.sequences_on_server() is None
        first = asyncio.ensure_future(generate(engine, n=8))
        async with asyncio.timeout(2):
            while engine.sequences_on_server() is None:
                await asyncio.sleep(0.01)
        assert engine.sequences_on_server() == 3 + 1  # running and waiting
        second = asyncio.ensure_future(generate(engine, n=8))
        await asyncio.sleep(0)
        assert engine.sequences_on_server() == 4 + 8
        answer.set()
        await asyncio.gather(first, second)


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


async def test_cancelling_a_request_closes_its_connection():
    ended = asyncio.Event()

    async def handler(request):
        try:
            return await forever(request)
        finally:
            ended.set()

    async with serving(generate=handler) as engine:
        request = asyncio.ensure_future(generate(engine))
        await asyncio.sleep(0.05)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await engine.close()
        assert engine._watching is not None
        await asyncio.wait({engine._watching}, timeout=2)
        assert engine._watching.done()


async def test_a_health_probe_takes_at_most_ten_seconds(monkeypatch):
    assert client_module.PROBE_TIMEOUT_S == 10.0
    monkeypatch.setattr(client_module, "PROBE_TIMEOUT_S", 0.1)
    async with serving(health=forever) as engine:
        began = time.monotonic()
        assert await engine.health() is False
        assert time.monotonic() - began < 2


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
