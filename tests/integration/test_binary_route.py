"""Our own route of a real vLLM server: the tokens of vLLM's JSON route bit for bit, each response when it
ends, beginnings that are gone on from, and a pause that keeps requests over a weight push.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest
from support.models import MAX_MODEL_LEN, TOKEN
from support.push import checkpoint, push

from megatron_dapo.rollout.client import EngineClient, RequestFailed, RequestRefused
from megatron_dapo.types import Completion, Partial

PROMPT = [10, 20, 30, 40, 50]
LONG = MAX_MODEL_LEN - len(PROMPT)


@pytest.fixture
async def json_engine(server) -> AsyncIterator[EngineClient]:
    """A client of the same server that does without our route."""
    client = EngineClient(server.url, TOKEN)
    client._in_frames = False
    yield client
    await client.close()


async def greedy(engine: EngineClient, tokens: int, **options) -> Completion:
    values = {"n": 1, "max_tokens": tokens, "temperature": 0.0, "weight_version": 0} | options
    [completion] = await engine.generate(PROMPT, **values)
    return completion


async def paused(engine: EngineClient, task: asyncio.Future, name: str) -> tuple[Partial, ...]:
    """Pause the server, keeping what runs, once each response of a request has tokens; returns those."""
    async with asyncio.timeout(60):
        while True:
            await engine.pause("keep")
            found = (await engine.partials()).get(name, ())
            if found and all(len(one.tokens) for one in found):
                return found
            await engine.resume()
            assert not task.done()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_the_tokens_are_those_of_the_json_route_bit_for_bit(engine, json_engine, temperature):
    options = {"max_tokens": 200, "temperature": temperature, "top_p": 0.95, "weight_version": 3}
    for n, seed in ((16, 7), (1, 100)):
        ours = await engine.generate(PROMPT, n=n, seed=seed, **options)
        assert engine._in_frames is True and json_engine._in_frames is False
        assert ours == await json_engine.generate(PROMPT, n=n, seed=seed, **options)
        assert len({completion.tokens.tobytes() for completion in ours}) == n


async def test_each_response_arrives_when_it_ends(engine):
    """Lengths are geometric, about 100 tokens, and all run at once: the shorter one arrives first."""
    arrived: list[Completion] = []
    left: list[int] = []

    def arrive(completion: Completion) -> None:
        arrived.append(completion)
        left.append(engine.sequences_on_server())

    completions = await engine.generate(
        PROMPT, n=8, max_tokens=LONG, temperature=1.0, seed=5, weight_version=0, arrived=arrive
    )
    lengths = [len(completion.tokens) for completion in arrived]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] / 2
    assert left == list(range(7, -1, -1))
    assert sorted(arrived, key=lambda completion: completion.number) == completions


async def test_cancelling_ends_the_sequences_on_the_server(engine):
    call = engine.generate(
        PROMPT, n=4, max_tokens=LONG, temperature=1e-3, seed=0, weight_version=0, request_id="gone"
    )
    task = asyncio.ensure_future(call)
    assert len(await paused(engine, task, "gone")) == 4
    await engine.resume()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.wait_idle(5)
    assert await engine.partials() == {}


async def test_a_response_goes_on_from_a_beginning_as_if_nothing_had_been(engine):
    whole = await greedy(engine, 400)
    task = asyncio.ensure_future(greedy(engine, 400, request_id="cut"))
    began = await paused(engine, task, "cut")
    await engine.abort(["cut"])
    with pytest.raises(RequestFailed, match="abort"):
        await task
    await engine.resume()
    size = len(began[0].tokens)
    assert 0 < size < 400 and began[0].finish_reason is None
    assert began[0].tokens.tolist() == whole.tokens[:size].tolist()
    assert began[0].logprobs.tobytes() == whole.logprobs[:size].tobytes()

    resumed = await greedy(engine, 400, began=began)
    assert resumed.tokens.tolist() == whole.tokens.tolist()
    assert resumed.logprobs[:size].tobytes() == whole.logprobs[:size].tobytes()
    assert list(resumed.logprobs) == pytest.approx(list(whole.logprobs), abs=1e-4)
    assert resumed.finish_reason == whole.finish_reason


async def test_a_group_goes_on_from_its_beginnings(engine):
    """Sampled: what had ended is returned as it was, the rest goes on and has the right lengths."""
    options = {"n": 8, "max_tokens": 300, "temperature": 1.0, "seed": 11, "weight_version": 0}
    two = asyncio.Event()
    arrived: list[Completion] = []

    def arrive(completion: Completion) -> None:
        arrived.append(completion)
        if len(arrived) == 2:
            two.set()

    task = asyncio.ensure_future(engine.generate(PROMPT, request_id="group", arrived=arrive, **options))
    await asyncio.wait_for(two.wait(), 60)
    await engine.pause("keep")  # what has been sampled is told before a pause is confirmed
    began = (await engine.partials())["group"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.resume()
    ended = [partial.finish_reason is not None for partial in began]
    assert 0 < sum(ended) < 8
    resumed = await engine.generate(PROMPT, began=began, **options)
    for completion, partial in zip(resumed, began, strict=True):
        size = len(partial.tokens)
        assert completion.tokens[:size].tolist() == partial.tokens.tolist()
        assert completion.finish_reason == "stop" or len(completion.tokens) == 300
        assert (len(completion.tokens) == size) == (partial.finish_reason is not None)
    assert [completion.number for completion in resumed] == list(range(8))


async def test_a_kept_request_goes_on_over_a_weight_push(engine, tiny_model):
    """The same weights under a new number: the tokens are those of an undisturbed request."""
    tensors = checkpoint(tiny_model)
    await push(engine, tensors, 41)
    whole = await greedy(engine, 500)
    task = asyncio.ensure_future(greedy(engine, 500, request_id="kept"))
    [began] = await paused(engine, task, "kept")
    await asyncio.sleep(0.5)
    [later] = (await engine.partials())["kept"]
    assert len(later.tokens) == len(began.tokens) and not task.done()  # nothing is generated
    assert began.versions == ((41, len(began.tokens)),)
    await push(engine, tensors, 42)
    await engine.resume()
    completion = await asyncio.wait_for(task, 60)
    assert completion.tokens.tolist() == whole.tokens.tolist()
    assert completion.logprobs.tobytes() == whole.logprobs.tobytes()
    (first, before), (second, after) = completion.versions
    assert (first, second, before) == (41, 42, len(began.tokens)) and before + after == 500


async def test_errors_are_those_of_the_json_route(engine, json_engine, server):
    """Prompt too long, nothing to sample, too many sequences, and no token of the run."""
    for client in (engine, json_engine):
        options = {"temperature": 1.0, "weight_version": 0}
        with pytest.raises(RequestRefused, match=r"answered 400.*1024"):
            await client.generate([5] * 2000, n=1, max_tokens=1, **options)
        with pytest.raises(RequestRefused, match=r"answered 400.*max_tokens"):
            await client.generate(PROMPT, n=1, max_tokens=0, **options)
        with pytest.raises(RequestRefused, match=r"answered 400.*max_num_seqs"):
            await client.generate(PROMPT, n=65, max_tokens=1, **options)
        with pytest.raises(RequestRefused, match=r"answered 400.*greedy"):
            await client.generate(PROMPT, n=2, max_tokens=1, temperature=0.0, weight_version=0)
    for path in ("generate", "partials", "progress"):
        url = f"{server.url}/megatron_dapo/v1/{path}"
        async with aiohttp.ClientSession() as session, session.post(url, json={}) as response:
            assert response.status == 401
    stranger = EngineClient(server.url, "wrong")
    with pytest.raises(RequestRefused, match="answered 401"):
        await stranger.generate(PROMPT, n=1, max_tokens=1, **options)
    await stranger.close()


async def test_tokens_are_counted_by_vllm_too(engine):
    """Those that were held back are in its counters when the request has ended."""
    before = await engine.load()
    completions = await engine.generate(
        PROMPT, n=4, max_tokens=100, temperature=1.0, seed=3, weight_version=0
    )
    sampled = sum(len(completion.tokens) for completion in completions)
    await engine.wait_idle()
    after = await engine.load()
    assert after.sequences == 0
    assert sampled <= after.tokens - before.tokens <= sampled + 4 * len(PROMPT)


def test_the_processor_time_is_that_of_the_api_process_alone(server):
    times = psutil.Process(server.pid).cpu_times()
    assert server.cpu_seconds() == pytest.approx(times.user + times.system, abs=0.5)
    assert times.user > 0
