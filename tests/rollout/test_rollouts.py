"""Sampling that goes on between two steps and over weight pushes, on fake engines: what a push waits for,
and what happens when something fails meanwhile.
"""

from __future__ import annotations

import asyncio
import gc

import pytest
from support.engines import Engines, ticks
from support.service import GREEDY, Core, engines_with, positions, prompts, runs_of, started, step

from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.fleet import EngineFailure
from megatron_dapo.rollout.rollouts import StopRequested, WeightsNeeded, _all
from megatron_dapo.types import Completion, Group

# --- between two steps ------------------------------------------------------------------


async def test_it_samples_on_between_two_steps_as_far_as_the_age_allows():
    """K = 3 and max_age 1, every group informative: 3 for the step and 3 for the next; behind the push, which
    brings the weights of the next step, 3 more.
    """
    engines = engines_with()
    async with Core(engines) as core:
        assert positions(await step(core, 0)) == [0, 1, 2]
        await engines.until(lambda: engines.client(0).running == 0)
        await ticks(20)
        assert started(engines) == [0, 1, 2, 3, 4, 5]
        await core.push(1)
        await ticks(20)
        assert started(engines) == list(range(9))
        groups = await step(core, 1)
        assert positions(groups) == [3, 4, 5] and {group.weight_version for group in groups} == {0}
        assert started(engines) == list(range(9))


@pytest.mark.parametrize(("max_age", "seeded"), [(0, False), (0, True), (1, True)])
async def test_strict_and_in_rounds_nothing_runs_between_two_steps(max_age, seeded):
    engines = engines_with()
    async with Core(engines, max_age=max_age, seeded=seeded) as core:
        assert positions(await step(core, 0)) == [0, 1, 2]
        before = started(engines)
        await engines.until(lambda: engines.client(0).running == 0)
        await core.push(1)
        await ticks(20)
        assert started(engines) == before and engines.client(0).pauses == []


async def test_what_fails_between_two_steps_is_raised_by_the_next_one_which_can_be_repeated():
    engines = engines_with(held={4})
    async with Core(engines) as core:
        await step(core, 0)
        engines.client(0).failures = {4: [RequestFailed("NaN", "not_a_number")] * 3}
        engines.client(0).held.clear()
        await engines.until(lambda: engines.client(0).failures[4] == [])
        await core.push(1)
        with pytest.raises(EngineFailure, match="failed 3 times"):
            await core.next_step(1)
        assert positions(await step(core, 1)) == [3, 4, 5]


async def test_the_only_engine_dies_between_two_steps_and_the_next_step_asks_for_weights():
    engines = engines_with(held={4})
    async with Core(engines) as core:
        await step(core, 0)
        engines.client(0).failures = {4: [EngineDied("gone")]}
        old = engines.client(0)
        old.held.clear()
        await engines.until(lambda: engines.client(0) is not old and engines.states == ["stale"])
        with pytest.raises(WeightsNeeded):
            await core.next_step(1)
        await core.push(1)
        assert positions(await step(core, 1)) == [3, 4, 5]
        assert engines.client(0).started[0] == 4, "what was under way is made first"


async def test_stopping_ends_what_runs_between_two_steps():
    engines = engines_with(2, held={3, 4})
    core = Core(engines)
    async with core:
        await step(core, 0)
        clients = [engines.client(0), engines.client(1)]
        assert sum(client.running for client in clients) > 0
    assert all(client.is_closed for client in clients)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_an_evaluation_does_not_wait_behind_training_requests():
    engines = Engines(rollout={"max_concurrency": 2}, prepare=lambda c: setattr(c, "held", {0, 1, 2, 3}))
    async with Core(engines) as core:
        task = asyncio.ensure_future(core.next_step(0))
        await engines.until(lambda: engines.client(0).started == [0])
        core.interrupt()  # the step is given up; its requests are not
        with pytest.raises(StopRequested):
            await task
        core._stopping = False
        evaluation = asyncio.ensure_future(core.submit(prompts(9)[7:], GREEDY))
        await ticks(5)
        engines.client(0).held.clear()
        await evaluation
        assert engines.client(0).started[1:3] == [7, 8]


async def test_only_kept_and_running_groups_hold_tokens():
    """Prompts 1 and 4 are all wrong: 2 responses each of 0, 2, 3 (in the caller's hands) and of 5, 6, 7 live.
    By their length they are told from other tests' ones.
    """
    engines = engines_with(delay=lambda prompt: 37)
    async with Core(engines) as core:
        core.grading.wrong = {1, 4}
        groups = await step(core, 0)
        assert positions(groups) == [0, 2, 3]
        await engines.until(lambda: engines.client(0).running == 0)
        await ticks(20)
        kept = [slot.prompt.position for slot in core.collector._slots if isinstance(slot.result, Group)]
        dropped = {1, 4} | ({*started(engines)} - {0, 2, 3, *kept})
        gc.collect()
        found = [thing for thing in gc.get_objects() if isinstance(thing, Completion)]
        alive = [completion for completion in found if len(completion.tokens) == 37]
        assert len(alive) == 2 * (3 + len(kept)) and dropped == {1, 4} and kept[:2] == [5, 6]


# --- pushes -----------------------------------------------------------------------------


async def test_a_push_does_not_wait_and_running_responses_go_on_with_the_new_weights():
    engines = engines_with(held={4})
    async with Core(engines) as core:
        await step(core, 0)
        await engines.until(lambda: engines.client(0).running == 2)  # 4 has made one token
        await core.push(1)
        assert engines.client(0).pauses == ["keep", "keep"] and not engines.client(0).is_paused
        assert engines.client(0).resets == 0  # no cache is emptied while requests run
        engines.client(0).held.clear()
        groups = await step(core, 1)
        assert positions(groups) == [3, 4, 5] and started(engines).count(4) == 1
        assert runs_of(groups[1]) == {((0, 1), (1, 2))} and groups[1].weight_version == 0
        assert runs_of(groups[0]) == runs_of(groups[2]) == {((0, 3),)}


async def test_engines_stand_still_during_a_push():
    engines = engines_with(held=set(), delay=lambda prompt: 3 if prompt < 3 else 50)
    async with Core(engines) as core:
        await step(core, 0)
        await core.pause()
        await ticks(2)
        before = await core.fleet.partials()
        await ticks(20)
        after = await core.fleet.partials()
        lengths = [[len(p.tokens) for ps in found.values() for p in ps] for found, _ in (before, after)]
        assert lengths[0] == lengths[1] and sum(lengths[0]) > 0
        await core.resume()
        assert positions(await step(core, 0)) == [3, 4, 5]


async def test_without_inflight_updates_a_push_waits_and_each_response_has_one_version():
    engines = engines_with(held={4})
    async with Core(engines, inflight_updates=False) as core:
        await step(core, 0)
        pushing = asyncio.ensure_future(core.push(1))
        await ticks(50)
        assert not pushing.done()
        engines.client(0).held.clear()
        await asyncio.wait_for(pushing, 5)
        assert engines.client(0).pauses == [] and engines.client(0).resets == 2
        groups = await step(core, 1)
        assert positions(groups) == [3, 4, 5]
        assert {run for group in groups for run in runs_of(group)} == {((0, 3),)}


async def test_requests_frozen_on_a_replica_that_fails_in_the_push_are_made_again_elsewhere():
    engines = engines_with(2, held={3, 4})
    async with Core(engines) as core:
        await step(core, 0)
        client = engines.client(0)
        lost = {prompt for prompt in client.started if prompt not in client.finished}
        assert lost & {3, 4}
        await core.push(1, fails={"engine_0": EngineDied("gone")})
        client.held.clear()
        groups = await step(core, 1)
        assert positions(groups) == [3, 4, 5]
        for group in groups:
            if group.prompt.position in lost:
                assert runs_of(group) == {((1, 3),)} and group.timing.engine == "engine_1"


@pytest.mark.parametrize("call", ["pause", "resume"])
async def test_a_replica_that_hangs_around_a_push_is_replaced_and_the_others_go_on(call):
    engines = engines_with(2, held={3, 4}, rollout={"progress_timeout_s": 0.05})
    async with Core(engines) as core:
        await step(core, 0)

        async def hangs(*mode: str) -> None:
            await asyncio.Event().wait()

        setattr(engines.client(1), call, hangs)
        await asyncio.wait_for(core.push(1), 5)
        engines.client(0).held.clear()
        assert positions(await step(core, 1)) == [3, 4, 5]
        phase = {"pause": "being paused", "resume": "going on"}[call]
        assert any(f"engine_1 failed while {phase}" in line for line in engines.messages)


async def test_a_replica_that_hangs_does_not_hold_a_checkpoint_up():
    engines = engines_with(2, held={3, 4}, rollout={"progress_timeout_s": 0.05})
    async with Core(engines) as core:
        await step(core, 0)
        for index in (0, 1):
            engines.client(index).partials = asyncio.Event().wait
        state = await asyncio.wait_for(core.state(), 5)
        assert {slot.prompt.position for slot in state["slots"]} == {3, 4, 5}


# --- waiting for a step -----------------------------------------------------------------


async def test_a_step_that_takes_its_time_to_stop_is_waited_for():
    """Also when it waited for weights: state() must not be asked of a collector that still gives the
    step up.
    """
    core = Core(Engines())
    given_up = False

    async def slow() -> None:
        nonlocal given_up
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            given_up = True

    core.fleet.router.weights_needed.set()
    with pytest.raises(WeightsNeeded):
        await core._result("step", slow)
    core.interrupt()
    with pytest.raises(StopRequested):
        await core._result("step", slow)
    assert given_up


async def test_all_cancels_the_others_before_it_raises():
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError):
        await _all([endless(), fails(), endless()])
    assert ended == [True, True]
