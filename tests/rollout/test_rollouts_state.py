"""What a checkpoint keeps of sampling that goes on: finished groups, the beginnings of running responses."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from support.collecting import carried, waiting
from support.engines import FakeClient, ticks
from support.service import Core, engines_with, positions, runs_of, started, step

from megatron_dapo.rollout import rollouts
from megatron_dapo.rollout.rollouts import StopRequested


@pytest.fixture(autouse=True)
def no_wait_between_looks(monkeypatch):
    monkeypatch.setattr(rollouts, "LOOK_S", 0.001)


def by_position(state: dict) -> dict:
    return {slot.prompt.position: slot for slot in state["slots"]}


async def test_a_checkpoint_keeps_finished_groups_and_the_beginnings_of_running_responses():
    engines = engines_with(held={4})
    async with Core(engines) as core:
        await step(core, 0)
        await engines.until(lambda: 5 in engines.client(0).finished)
        await ticks(5)
        state = pickle.loads(pickle.dumps(await core.state()))
        assert carried(state) == [3, 5] and waiting(state) == [4]
        began = by_position(state)[4].began
        assert [(list(p.tokens), p.versions, p.finish_reason) for p in began] == [([5], ((0, 1),), None)] * 2
        assert state["prompts"] == {"position": 6}
        assert engines.client(0).running == 2, "sampling goes on"


async def test_a_run_that_is_killed_goes_on_with_what_was_made():
    """The 4 had one token of version 0; after the resume it makes the other two with version 1, and what was
    finished is not made again.
    """
    engines, others = engines_with(held={4}), engines_with()
    async with Core(engines) as core:
        await step(core, 0)
        await core.push(1)
        await engines.until(lambda: 8 in engines.client(0).finished)
        again = await core.restarted(others)
    async with again:
        await again.push(1)
        groups = await step(again, 1)
        assert positions(groups) == [3, 4, 5]
        assert [runs_of(group) for group in groups] == [{((0, 3),)}, {((0, 1), (1, 2))}, {((0, 3),)}]
        assert started(others) == [4]


async def test_a_signal_in_a_step_keeps_what_the_step_has_made():
    engines, others = engines_with(held={1}), engines_with()
    async with Core(engines) as core:
        task = asyncio.ensure_future(core.next_step(0))
        await engines.until(lambda: {0, 2} <= set(engines.client(0).finished))
        core.interrupt()
        with pytest.raises(StopRequested):
            await task
        state = await core.state()
        assert {0, 2} <= set(carried(state)) and len(by_position(state)[1].began[0].tokens) == 1
        again = await core.restarted(others)
    async with again:
        assert positions(await step(again, 0)) == [0, 1, 2]
        assert not {0, 2} & set(others.client(0).started)


@pytest.mark.parametrize("inflight_updates", [True, False])
async def test_after_a_signal_a_push_waits_for_nothing_and_nothing_is_lost(inflight_updates):
    engines = engines_with(held={4})
    async with Core(engines, inflight_updates=inflight_updates) as core:
        await step(core, 0)
        await engines.until(lambda: 5 in engines.client(0).finished)
        core.interrupt()
        await asyncio.wait_for(core.push(1), 2)  # the update that ran when the signal came
        with pytest.raises(StopRequested):
            await core.next_step(1)
        state = await core.state()
        assert {3, 5} <= set(carried(state)) and len(by_position(state)[4].began[0].tokens) == 1


async def test_completions_that_wait_for_their_grades_are_kept_whole():
    engines = engines_with()
    async with Core(engines) as core:
        core.grading.held.add(4)
        await step(core, 0)
        await engines.until(lambda: 4 in engines.client(0).finished)
        await ticks(5)
        began = by_position(await core.state())[4].began
        assert [(len(p.tokens), p.finish_reason) for p in began] == [(3, "stop")] * 2
        core.grading.held.clear()


async def test_requests_that_wait_for_room_or_have_no_token_yet_begin_anew():
    engines = engines_with(held={0})
    engines.fleet.router._max_concurrency = 2
    async with Core(engines) as core:
        task = asyncio.ensure_future(core.next_step(0))
        await engines.until(lambda: engines.client(0).started == [0])
        state = await core.state()
        assert [len(slot.began) for slot in state["slots"]][:3] == [2, 0, 0]
        assert all(slot.admitted for slot in state["slots"]) and carried(state) == []
        engines.client(0).held.clear()
        await task


async def test_a_replica_that_does_not_tell_keeps_neither_its_running_nor_its_finished_responses():
    """Its running ones are the long ones of what it was given. To keep the finished ones beside them would
    prefer the short ones. Of the other replica all is kept.
    """
    engines = engines_with(2, held={3, 4})
    async with Core(engines) as core:
        await step(core, 0)
        await core.push(1)
        await engines.until(
            lambda: {5, 6, 7, 8} <= {*engines.client(0).finished, *engines.client(1).finished}
        )
        await ticks(5)
        engine_of = {p: i for i in (0, 1) for p in engines.client(i).started}
        mute = engine_of[3]
        engines.client(mute).tells_partials = False
        slots = by_position(await core.state())
        for position in range(3, 9):
            slot = slots[position]
            kept = slot.result is not None or len(slot.began) > 0
            assert kept == (engine_of[position] != mute), position


async def test_an_answer_on_its_way_is_waited_for(monkeypatch):
    """The server has sent it and does not know the request any more; the client does not have it yet."""
    engines = engines_with(held={4})
    async with Core(engines) as core:
        await step(core, 0)
        await engines.until(lambda: 5 in engines.client(0).finished)
        client = engines.client(0)
        monkeypatch.setattr(client, "partials", answered_later(client))
        state = await core.state()
        assert 4 in carried(state) and by_position(state)[4].began == ()


def answered_later(client: FakeClient):
    """`partials` of a server that has just answered all requests."""

    async def partials() -> dict:
        asyncio.get_running_loop().call_soon(client.held.clear)
        return {}

    return partials
