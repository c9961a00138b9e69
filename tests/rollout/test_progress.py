"""Progress is read from vLLM's counters; requests of a server without any are ended."""

from __future__ import annotations

import asyncio

import pytest
from support.http_server import metrics

from megatron_dapo.rollout.progress import InFlight, ProgressClock, ServerLoad, parse_load


def test_the_load_is_read_from_the_counters_and_nothing_else():
    """10 prompt tokens and 7 generated; 3 running, 1 waiting. Histograms and reasons do not count."""
    assert parse_load(metrics(tokens=7, running=3)) == ServerLoad(tokens=17, sequences=4)


def test_engines_of_one_server_are_added_up():
    text = "\n".join(f'vllm:generation_tokens_total{{engine="{i}"}} {10.0 * i}' for i in range(4))
    assert parse_load(text) == ServerLoad(tokens=60, sequences=0)


def test_large_counters_are_read_whole():
    assert parse_load('vllm:generation_tokens_total{engine="0"} 1.23456789e+08').tokens == 123456789


def test_a_server_without_the_counter_has_no_load():
    assert parse_load("") is None
    assert parse_load('vllm:num_requests_running{engine="0"} 3.0') is None


def test_time_without_progress():
    clock = ProgressClock(now=100.0)
    assert clock.without_progress(105.0) == 5.0
    clock.observe(7, now=106.0)  # the first count is progress: it was never seen before
    assert clock.without_progress(110.0) == 4.0
    clock.observe(7, now=120.0)
    clock.observe(None, now=125.0)  # no answer
    assert clock.without_progress(126.0) == 20.0
    clock.observe(8, now=127.0)
    assert clock.without_progress(127.5) == 0.5
    clock.answered(now=130.0)
    assert clock.without_progress(131.0) == 1.0


# --- requests in flight


async def request(in_flight: InFlight) -> None:
    with in_flight.one():
        await asyncio.Event().wait()


async def started(in_flight: InFlight, number: int) -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(request(in_flight)) for _ in range(number)]
    await asyncio.sleep(0)
    assert len(in_flight) == number
    return tasks


async def test_all_requests_in_flight_are_ended_with_an_error():
    in_flight = InFlight()
    tasks = await started(in_flight, 3)
    error = TimeoutError("stalled")
    in_flight.end(error)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error] * 3
    assert len(in_flight) == 0
    [later] = await started(in_flight, 1)  # an end is not for requests that come after it
    later.cancel()
    with pytest.raises(asyncio.CancelledError):
        await later


async def test_a_request_that_was_ended_can_be_gone_on_from():
    """Its task is not cancelled: it can make the request again."""
    in_flight = InFlight()

    async def twice() -> str:
        with pytest.raises(TimeoutError):
            await request(in_flight)
        await asyncio.sleep(0)
        return "again"

    task = asyncio.ensure_future(twice())
    await asyncio.sleep(0)
    in_flight.end(TimeoutError())
    assert await task == "again"


async def test_a_cancelled_request_is_cancelled_even_if_it_is_ended_too():
    in_flight = InFlight()
    [task] = await started(in_flight, 1)
    task.cancel()
    in_flight.end(TimeoutError())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(in_flight) == 0


async def test_ending_twice_gives_the_first_error():
    in_flight = InFlight()
    [task] = await started(in_flight, 1)
    in_flight.end(TimeoutError("first"))
    in_flight.end(TimeoutError("second"))
    with pytest.raises(TimeoutError, match="first"):
        await task
