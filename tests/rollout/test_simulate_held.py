"""A simulated engine that stands still, changes its weights, tells its beginnings and fails in every way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.simulated_engines import VERSION, in_loop, make_client, make_engine

from megatron_dapo.errors import UserError
from megatron_dapo.rollout.client import EngineDied, EngineStalled
from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.rollout.simulate_client import SimulatedServer
from megatron_dapo.rollout.simulate_model import Fault


def test_a_paused_response_goes_on_and_its_later_tokens_are_of_the_new_weights():
    """30 tokens at 10 a second: 10 before the pause of 2 s, 20 after it."""

    async def main() -> tuple[Any, float]:
        engine = make_engine({1: 10})
        client = make_client(engine, 30, [])
        call = asyncio.ensure_future(client.generate([0], n=1, max_tokens=99, weight_version=VERSION))
        await asyncio.sleep(1)
        await client.pause("keep")
        await asyncio.sleep(2)
        await client.finish_weight_update(str(VERSION + 1))
        await client.resume()
        (completion,) = await call
        return completion, asyncio.get_running_loop().time()

    completion, ended = in_loop(main)
    assert ended == pytest.approx(5)
    assert completion.versions == ((VERSION, 10), (VERSION + 1, 20))


def test_what_waits_over_an_update_is_of_the_new_weights_alone():
    async def main() -> Any:
        engine = make_engine({1: 10}, max_running=1)
        client = make_client(engine, 20, [])
        calls = [client.generate([i], n=1, max_tokens=99, weight_version=VERSION) for i in range(2)]
        both = asyncio.gather(*calls)
        await asyncio.sleep(1)
        engine.load_weights(VERSION + 1)
        return [completion.versions for (completion,) in await both]

    assert in_loop(main) == [((VERSION, 10), (VERSION + 1, 10)), ((VERSION + 1, 20),)]


def test_a_paused_engine_is_idle_and_not_stalled():
    async def main() -> float:
        engine = make_engine({1: 10})
        engine.set_phase("sync")
        request = engine.submit(1, [20])
        engine.hold(paused=True)
        await asyncio.sleep(100)
        engine.hold(paused=False)
        await request.done
        engine.set_phase("end")
        assert {key: s for key, s in engine.time_in.items() if s} == {
            ("sync", "idle"): pytest.approx(100),
            ("sync", "busy"): pytest.approx(2),
        }
        return asyncio.get_running_loop().time()

    assert in_loop(main) == pytest.approx(102)


def test_the_clock_of_a_stalled_engine_stands_still_while_it_is_paused():
    """Stalled from the beginning, paused from second 20 to 120: 30 s without progress are over at 150."""

    async def main() -> float:
        engine = make_engine({1: 10})
        request = engine.submit(1, [20])
        engine.strike(Fault(engine=0, kind="stall", at_s=0))
        await asyncio.sleep(20)
        engine.hold(paused=True)
        await asyncio.sleep(100)
        engine.hold(paused=False)
        with pytest.raises(EngineStalled):
            await request.done
        return asyncio.get_running_loop().time()

    assert in_loop(main) == pytest.approx(150)


def test_completions_arrive_one_by_one():
    """Of 10, 11 and 12 tokens, at 30 tokens/s in all: after 1 s, 1 + 2/30 s, 1 + 2/30 + 1/30 s."""

    async def main() -> list[tuple[int, float]]:
        arrivals: list[tuple[int, float]] = []
        loop = asyncio.get_running_loop()
        client = make_client(make_engine({1: 30}), 10, [])
        answer = await client.generate(
            [0],
            n=3,
            max_tokens=99,
            weight_version=VERSION,
            arrived=lambda completion: arrivals.append((completion.number, loop.time())),
        )
        assert [completion.number for completion in answer] == [0, 1, 2]
        return arrivals

    numbers, seconds = zip(*in_loop(main), strict=True)
    assert numbers == (0, 1, 2)
    assert seconds == pytest.approx([1, 1 + 2 / 30, 1 + 3 / 30])


def test_beginnings_are_told_and_gone_on_from():
    """Two samples of 20 and 21 tokens at 10 each a second; after 1 s each has 10. Another engine goes on
    from there, having read 10 tokens and the prompt of 5 of each again, at 50 a second.
    """

    async def main() -> None:
        options: dict[str, Any] = {"n": 2, "max_tokens": 99, "weight_version": VERSION}
        client = make_client(make_engine({1: 20}), 20, [])
        call = asyncio.ensure_future(client.generate(range(5), request_id="a", **options))
        await asyncio.sleep(1)
        told = await client.partials()
        call.cancel()
        assert told.keys() == {"a"}
        assert [partial.versions for partial in told["a"]] == [((VERSION, 10),)] * 2
        assert [len(partial.tokens) for partial in told["a"]] == [10, 10]
        assert [partial.finish_reason for partial in told["a"]] == [None, None]
        engine = make_engine({1: 20}, prefill_tokens_per_second=50)
        engine.version = VERSION + 2
        loop = asyncio.get_running_loop()
        began = loop.time()
        first, second = await make_client(engine, 20, []).generate(range(5), began=told["a"], **options)
        assert loop.time() - began == pytest.approx(30 / 50 + 20 / 20 + 1 / 20)
        assert first.versions == ((VERSION, 10), (VERSION + 2, 10))
        assert second.versions == ((VERSION, 10), (VERSION + 2, 11))
        assert await client.partials() == {}

    in_loop(main)


def test_finished_beginnings_come_back_as_they_are():
    async def main() -> None:
        options: dict[str, Any] = {"n": 2, "max_tokens": 99, "weight_version": VERSION}
        client = make_client(make_engine({1: 20}), 20, [])
        call = asyncio.ensure_future(client.generate([0], request_id="a", **options))
        await asyncio.sleep(2.01)
        told = (await client.partials())["a"]
        call.cancel()
        assert [partial.finish_reason for partial in told] == ["stop", None]
        first, second = await client.generate([0], began=told, **options)
        assert (first.number, first.versions) == (0, ((VERSION, 20),))
        assert (second.number, second.versions) == (1, ((VERSION, 21),))

    in_loop(main)


def test_a_share_of_the_requests_fails_and_loses_its_tokens():
    lost: list[tuple[int, int, str]] = []

    async def main() -> int:
        engine = make_engine({1: 1000})
        engine.strike(Fault(engine=0, kind="failing", at_s=0, share=0.25))
        client = make_client(engine, 20, lost)
        failed = 0
        for position in range(400):
            try:
                await client.generate([position], n=2, max_tokens=99, weight_version=VERSION)
            except RequestFailed:
                failed += 1
        return failed

    failed = in_loop(main)
    assert 100 - 35 < failed < 100 + 35  # four standard errors
    assert len(lost) == failed and {tokens for _, tokens, _ in lost} == {40}


def test_starts_fail_as_often_as_the_fault_says_and_then_the_warm_up():
    async def main() -> list[str]:
        engine = make_engine({1: 10}, start_s=5.0)
        engine.strike(Fault(engine=0, kind="death", at_s=0, starts_fail=2, warm_ups_fail=1))
        server, seen = SimulatedServer(engine), []
        for _ in range(4):
            server.start()
            try:
                await server.wait_healthy(60)
                await make_client(engine, 4, []).warm_up(60)
                seen.append("up")
            except UserError:
                seen.append("start")
            except EngineDied:
                seen.append("warm-up")
            server.stop()
        assert asyncio.get_running_loop().time() == pytest.approx(4 * 5)
        return seen

    assert in_loop(main) == ["start", "start", "warm-up", "up"]


def test_a_push_takes_its_seconds_and_fails_on_an_engine_that_dies():
    async def main() -> None:
        engine = make_engine({1: 10}, sync_s=10.0)
        client = make_client(engine, 4, [])
        loop = asyncio.get_running_loop()
        await client.start_weight_update()
        for _ in range(4):
            await client.update_weights({})
        await client.finish_weight_update("9")
        assert loop.time() == pytest.approx(10) and engine.version == 9
        loop.call_later(0.5, engine.strike, Fault(engine=0, kind="death", at_s=0))
        with pytest.raises(EngineDied):
            await client.start_weight_update()
        assert engine.version is None

    in_loop(main)
