"""The client and our own route: what is asked, what arrives when, beginnings, and the JSON fallback."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
from aiohttp import web
from support.http_server import choice, forever, frame, serving, stream

from megatron_dapo.rollout.client import EngineClient, RequestFailed
from megatron_dapo.rollout.wire import EndFrame, encode
from megatron_dapo.types import Completion, Partial


def partial(tokens, logprobs, versions, finish_reason=None) -> Partial:
    return Partial(
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        versions=versions,
        finish_reason=finish_reason,
    )


STARTED = partial((3, 4), (-0.25, -0.75), ((8, 2),))
ENDED = partial((5,), (-2.0,), ((8, 1),), "stop")
NOTHING = partial((), (), ())


def content(one: Completion | Partial) -> tuple:
    return one.tokens.tolist(), one.logprobs.tolist(), one.versions, one.finish_reason


async def generate(engine: EngineClient, n: int = 1, **options) -> list[Completion]:
    values = {"max_tokens": 9, "temperature": 0.5, "weight_version": 9} | options
    return await engine.generate([10, 20], n=n, **values)


class Recorder:
    """A handler that answers with `frames` and keeps what it was asked."""

    def __init__(self, *frames) -> None:
        self.frames, self.bodies = frames, []

    async def __call__(self, request):
        self.bodies.append(await request.json())
        return await stream(request, self.frames)


async def test_what_is_asked():
    handler = Recorder(frame(index=1), frame(index=0))
    async with serving(generate=handler) as engine:
        await generate(engine, 2, top_p=0.9, seed=7, stop_token_ids=(1,), request_id="mine")
    assert handler.bodies == [
        {
            "token_ids": [10, 20],
            "n": 2,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop_token_ids": [1],
            "seed": 7,
            "request_id": "mine",
            "cache_salt": "9",
        }
    ]


async def test_each_completion_arrives_when_it_ends_and_the_answer_is_in_order():
    more = [asyncio.Event() for _ in range(3)]

    async def handler(request):
        response = await stream(request, b"")
        for index, event in zip((2, 0, 1), more, strict=True):
            await event.wait()
            await response.write(encode(frame((7, index), index=index)))
        await response.write(encode(EndFrame(count=3)))
        return response

    seen: list[int] = []
    async with serving(generate=handler) as engine:
        task = asyncio.ensure_future(
            generate(engine, 3, seed=50, arrived=lambda completion: seen.append(completion.number))
        )
        for number, event in enumerate(more):
            await asyncio.sleep(0.05)
            assert seen == [2, 0, 1][:number]
            assert engine.sequences_on_server() == 3 - number  # those that have ended are not there any more
            event.set()
        completions = await task
        assert engine.sequences_on_server() == 0
    assert seen == [2, 0, 1]
    assert [(c.number, c.seed, c.tokens.tolist()) for c in completions] == [
        (0, 50, [7, 0]),
        (1, 51, [7, 1]),
        (2, 52, [7, 2]),
    ]


async def test_what_the_receiver_raises_ends_the_request():
    def refuse(completion):
        raise KeyError("mine")

    async with serving(generate=Recorder(frame())) as engine:
        with pytest.raises(KeyError, match="mine"):
            await generate(engine, arrived=refuse)
        assert len(await generate(engine)) == 1


# --- beginnings


async def test_a_response_goes_on_from_its_beginning():
    """Number 1 has ended, 0 goes on, 2 begins: the server hears of two sequences."""
    handler = Recorder(
        frame(index=1, finish_reason="stop"), frame(index=0, logprobs=(-1.0, -3.0), runs=(("9", 2),))
    )
    seen: list[int] = []
    async with serving(generate=handler) as engine:
        completions = await generate(
            engine,
            3,
            seed=100,
            began=[STARTED, ENDED, NOTHING],
            arrived=lambda completion: seen.append(completion.number),
        )
    assert [content(completion) for completion in completions] == [
        ([3, 4, 7, 8], [-0.25, -0.75, -1.0, -3.0], ((8, 2), (9, 2)), "length"),
        ([5], [-2.0], ((8, 1),), "stop"),
        ([7, 8], [-0.5, -1.5], ((9, 2),), "stop"),
    ]
    assert [completion.seed for completion in completions] == [100, 101, 102]
    assert seen == [1, 2, 0]  # what had ended arrives at once
    [body] = handler.bodies
    assert (body["n"], body["began"], body["numbers"]) == (2, [[3, 4], []], [0, 2])
    assert (body["max_tokens"], body["seed"]) == (9, 100)  # the server subtracts what was begun


async def test_beginnings_that_have_all_ended_need_no_server():
    long = partial((1, 2, 3), (-1, -1, -1), ((8, 3),))
    engine = EngineClient("http://127.0.0.1:9", "token")
    completions = await generate(engine, 2, began=[ENDED, long], max_tokens=3)
    assert [completion.finish_reason for completion in completions] == ["stop", "length"]
    await engine.close()


async def test_a_broken_beginning_is_noticed_before_anything_is_sampled():
    with pytest.raises(ValueError, match="began has 1 beginnings for n=2"):
        await generate(EngineClient("http://127.0.0.1:9", "token"), 2, began=[ENDED])


async def test_partials_are_of_the_requests_that_run_with_what_they_began_from():
    async def partials(request):
        frames = [
            frame((6,), (-0.5,), index=0, finish_reason=None, runs=(("9", 1),), request_id="a"),
            frame(index=1, finish_reason="stop", request_id="a"),
            frame(index=0, finish_reason=None, request_id="b"),
            frame((), (), index=1, finish_reason=None, request_id="b"),
            frame(request_id="someone-elses"),
        ]
        return await stream(request, frames)

    async with serving(generate=forever, partials=partials) as engine:
        tasks = [
            asyncio.ensure_future(generate(engine, 3, request_id="a", began=[ENDED, STARTED, NOTHING])),
            asyncio.ensure_future(generate(engine, 2, request_id="b")),
            asyncio.ensure_future(generate(engine, 2)),
        ]
        await asyncio.sleep(0.1)
        found = await engine.partials()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await engine.partials() == {}
    assert {name: [content(one) for one in ones] for name, ones in found.items()} == {
        "a": [
            ([5], [-2.0], ((8, 1),), "stop"),
            ([3, 4, 6], [-0.25, -0.75, -0.5], ((8, 2), (9, 1)), None),
            ([7, 8], [-0.5, -1.5], ((9, 2),), "stop"),
        ],
        "b": [([7, 8], [-0.5, -1.5], ((9, 2),), None), ([], [], (), None)],
    }


async def test_a_server_that_cannot_tell_partials_has_none_and_one_that_fails_raises():
    async def broken(request):
        return web.Response(status=500, text="no")

    async with serving() as engine:
        assert await engine.partials() == {}
    async with serving(partials=broken) as engine:
        with pytest.raises(RequestFailed, match="no"):
            await engine.partials()


# --- the server's other calls


async def test_a_request_is_aborted_by_its_name_on_either_route():
    bodies = []

    async def abort(request):
        bodies.append(await request.json())
        return web.Response()

    async with serving(abort=abort) as engine:
        await engine.abort(["a", "b"])
        await engine.abort([])
    assert bodies == [
        {"request_ids": ["megatron_dapo-a", "generate-tokens-a", "megatron_dapo-b", "generate-tokens-b"]}
    ]


async def test_a_pause_that_keeps_requests_keeps_what_they_have_computed():
    asked = []

    async def pause(request):
        asked.append(dict(request.query))
        return web.json_response({})

    async with serving(pause=pause) as engine:
        await engine.pause("keep")
        await engine.pause()
    assert asked == [{"mode": "keep", "clear_cache": "false"}, {"mode": "wait", "clear_cache": "true"}]


# --- without our own route


def sampled(body: dict) -> web.Response:
    n = body["sampling_params"]["n"]
    return web.json_response({"choices": [choice(index=i) for i in reversed(range(n))]})


async def test_a_server_without_our_route_is_asked_for_json_and_warned_of_once(caplog):
    bodies, seen = [], []

    async def json_handler(request):
        bodies.append(await request.json())
        return sampled(bodies[-1])

    async with serving(json=json_handler) as engine:
        with caplog.at_level(logging.WARNING, logger="megatron_dapo"):
            await asyncio.gather(
                *(generate(engine, 2, seed=5, request_id="mine", arrived=seen.append) for _ in range(2))
            )
            await generate(engine)
        assert await engine.partials() == {}
    assert [record.getMessage().count("/megatron_dapo/v1/generate") for record in caplog.records] == [1]
    assert [completion.number for completion in seen] == [0, 1, 0, 1]
    assert bodies[0] == {
        "request_id": "mine",
        "token_ids": [10, 20],
        "sampling_params": {
            "n": 2,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 1.0,
            "logprobs": 0,
            "detokenize": False,
            "stop_token_ids": [],
            "seed": 5,
        },
        "cache_salt": "9",
    }


async def test_without_our_route_each_beginning_is_a_request():
    bodies = []

    async def json_handler(request):
        bodies.append(await request.json())
        return sampled(bodies[-1])

    async with serving(json=json_handler) as engine:
        completions = await generate(engine, 3, seed=100, began=[STARTED, ENDED, NOTHING])
    assert [completion.tokens.tolist() for completion in completions] == [[3, 4, 7, 8], [5], [7, 8]]
    asked = sorted((body["token_ids"], body["sampling_params"]) for body in bodies)
    assert [(tokens, params["n"], params["max_tokens"]) for tokens, params in asked] == [
        ([10, 20], 1, 9),
        ([10, 20, 3, 4], 1, 7),
    ]
    # number 2 has seed 100 + 2; number 0 goes on and must not draw its first numbers again
    assert asked[0][1]["seed"] == 102 and asked[1][1]["seed"] not in (100, 101, 102)


async def test_one_beginning_that_fails_ends_the_others():
    ended = asyncio.Event()

    async def json_handler(request):
        if len((await request.json())["token_ids"]) == 4:
            return web.Response(status=500, text="no")
        try:
            return await forever(request)
        finally:
            ended.set()

    async with serving(json=json_handler) as engine:
        with pytest.raises(RequestFailed, match="no"):
            await generate(engine, 2, began=[STARTED, NOTHING])
        await asyncio.wait_for(ended.wait(), 2)
