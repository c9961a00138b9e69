"""Which replica takes a request, and how many it has at once."""

from __future__ import annotations

import asyncio

import pytest
from support.engines import Engines, ticks

from megatron_dapo.rollout.fleet import Fleet


async def generate(fleet: Fleet, prompt: int, n: int = 1) -> list:
    return await fleet.generate([prompt], n=n, seed_of=lambda version: None)


async def test_no_replica_runs_more_sequences_than_it_may():
    engines = Engines(num=2, rollout={"max_concurrency": 10})
    fleet = await engines.started()
    for index in (0, 1):
        engines.client(index).delay = lambda prompt: prompt % 7
    await asyncio.gather(*(generate(fleet, prompt, n=4) for prompt in range(50)))
    assert engines.client(0).most_running == engines.client(1).most_running == 8  # a third group would be 12
    assert sorted(engines.client(0).finished + engines.client(1).finished) == list(range(50))


async def test_the_least_loaded_is_next_and_the_first_in_line_goes_first():
    engines = Engines(num=2, rollout={"max_concurrency": 2})
    fleet = await engines.started()
    engines.client(0).held = {0, 2}
    engines.client(1).held = {1, 3}
    tasks = [asyncio.ensure_future(generate(fleet, prompt)) for prompt in range(7)]
    await ticks(5)
    assert engines.client(0).started == [0, 2] and engines.client(1).started == [1, 3]
    engines.client(1).held = {3}
    await ticks(10)
    assert engines.client(1).started == [1, 3, 4, 5, 6]
    engines.client(0).held = engines.client(1).held = set()
    await asyncio.gather(*tasks)


async def test_a_group_too_large_for_the_limit_is_sent_when_nothing_else_runs():
    """The server refuses it with words; here it must not wait for ever."""
    engines = Engines(num=1, rollout={"max_concurrency": 2})
    fleet = await engines.started()
    assert len(await asyncio.wait_for(generate(fleet, 0, n=5), 2)) == 5


async def test_sequences_that_have_ended_make_room_before_their_group_does():
    engines = Engines(num=1, rollout={"max_concurrency": 4})
    fleet = await engines.started()
    engines.client(0).held = {0}
    tasks = [asyncio.ensure_future(generate(fleet, prompt, n=4)) for prompt in range(2)]
    await ticks(5)
    assert engines.client(0).started == [0]
    engines.client(0).on_server = 0  # as its counters say: all four have ended, and the answer is on its way
    fleet.router.dispatch()
    await ticks(5)
    assert engines.client(0).started == [0, 1]
    engines.client(0).held = set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("when", [0, 1, 2, 3, 4])
async def test_a_cancelled_request_gives_its_room_back(when):
    engines = Engines(num=1, rollout={"max_concurrency": 1})
    fleet = await engines.started()
    engines.client(0).held = {0}
    first, second = (asyncio.ensure_future(generate(fleet, prompt)) for prompt in (0, 1))
    third = asyncio.ensure_future(generate(fleet, 2))
    await ticks(3)
    first.cancel()
    await ticks(when)
    second.cancel()
    assert len(await asyncio.wait_for(third, 2)) == 1
    await asyncio.gather(first, second, return_exceptions=True)
    assert fleet.replicas[0].in_flight == 0


async def test_weights_are_not_needed_when_nobody_waits_any_more():
    engines = Engines(num=1)
    fleet = await engines.started(version=None)
    task = asyncio.ensure_future(generate(fleet, 0))
    await asyncio.wait_for(fleet.router.weights_needed.wait(), 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not fleet.router.weights_needed.is_set()


async def test_requests_that_get_room_at_once_are_spread_over_the_replicas():
    """What a server last said of its load is older than what the router has just given to it."""
    engines = Engines(num=4, rollout={"max_concurrency": 64})
    fleet = await engines.started()
    for index in range(4):
        engines.client(index).held = set(range(12))
        engines.client(index).on_server = 0
    fleet.router.paused = True
    tasks = [asyncio.ensure_future(generate(fleet, prompt, n=16)) for prompt in range(12)]
    await ticks(5)
    await fleet.resume()
    await ticks(5)
    assert [len(engines.client(index).started) for index in range(4)] == [3, 3, 3, 3]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [replica.unsent for replica in fleet.replicas] == [0] * 4


async def test_a_request_cancelled_between_its_grant_and_its_sending_is_no_load_any_more():
    engines = Engines(num=1)
    fleet = await engines.started()
    task = asyncio.ensure_future(generate(fleet, 0, n=4))
    await asyncio.sleep(0)  # granted; its task has not gone on
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert fleet.replicas[0].unsent == fleet.replicas[0].in_flight == 0
