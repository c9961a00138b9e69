"""Caps, windows, the end of the data, dead engines, restarts."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import pytest
from support.collecting import (
    MIXED,
    RIGHT,
    WRONG,
    Sampler,
    believe,
    carried,
    collect,
    make,
    positions,
    state_of,
    waiting,
)

from megatron_dapo.rollout.collect import Collector, SamplingCapReached
from megatron_dapo.rollout.errors import EngineDied

# --- caps, windows and the end of the data ----------------------------------------------


@pytest.mark.parametrize("one_round_at_a_time", [False, True])
async def test_the_cap_is_an_error_that_teaches(one_round_at_a_time):
    collector, sampler = make(
        [RIGHT, WRONG, WRONG, MIXED] + [WRONG] * 20, max_prompts=8, one_round_at_a_time=one_round_at_a_time
    )
    with pytest.raises(SamplingCapReached) as error:
        await collect(collector, sampler)
    assert len(sampler.started) == 8 and sampler.running == 0
    for words in (
        "only 1 of",
        "prompts_per_step=3",
        "max_prompts=8",
        "1 all correct",
        "6 all wrong",
        "on_cap",
    ):
        assert words in str(error.value)


async def test_the_cap_can_train_a_smaller_batch():
    collector, sampler = make(
        [WRONG, MIXED, WRONG, MIXED] + [WRONG] * 20, max_prompts=8, on_cap="train_smaller_batch"
    )
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [1, 3]
    assert collected.counts["all_wrong"] == 6 and not collected.exhausted
    sampler.stream.correct = []
    assert positions((await collect(collector, sampler, 1)).groups) == [8, 9, 10]


async def test_a_smaller_batch_of_nothing_is_an_error():
    collector, sampler = make([WRONG] * 20, max_prompts=8, on_cap="train_smaller_batch")
    with pytest.raises(SamplingCapReached, match="only 0 of"):
        await collect(collector, sampler)


async def test_a_smaller_batch_keeps_informative_groups_behind_a_gap():
    """Prompts 0..3 wait, the cap lets only 0, 1, 2 out, and 4 is carried: it can not be trained on before 3,
    nor vanish.
    """
    collector, sampler = make([MIXED, WRONG, WRONG], max_prompts=3, on_cap="train_smaller_batch", max_age=2)
    collector.load_state(state_of(waiting=range(4), carried=[4]))
    sampler.stream.position = 5
    first = await collect(collector, sampler, 1)
    assert positions(first.groups) == [0] and first.counts["carried_over"] == 1
    second = await collect(collector, sampler, 2)
    assert positions(second.groups) == [3, 4, 5]


async def test_an_inclusive_window_counts_what_is_outside():
    collector, sampler = make([1, 2, 3, RIGHT, 2, 2], low=0.5, high=0.5, inclusive=True)
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [1, 4, 5]
    assert collected.counts["outside_window"] == 2 and collected.counts["all_correct"] == 1


async def test_the_adaptive_window_widens_only_at_the_cap():
    """Window (0.4, 0.6) takes 2 of 4 right; widened it takes 1 and 3 of 4 as well, never 0 or 4 of 4."""
    script = [1, RIGHT, 2, WRONG, 3, 1]
    narrow = {"low": 0.4, "high": 0.6, "max_prompts": 6}
    collector, sampler = make(script, adaptive=True, **narrow)
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [0, 2, 4]
    assert len(sampler.started) == 6

    collector, sampler = make(script, **narrow)
    with pytest.raises(SamplingCapReached, match="only 1 of"):
        await collect(collector, sampler)

    collector, sampler = make([2, 2, 1, 2], adaptive=True, **narrow)
    assert positions((await collect(collector, sampler)).groups) == [0, 1, 3]  # no need to widen

    collector, sampler = make([RIGHT, WRONG] * 3, adaptive=True, **narrow)
    with pytest.raises(SamplingCapReached):
        await collect(collector, sampler)


@pytest.mark.parametrize("one_round_at_a_time", [False, True])
async def test_the_end_of_the_data_gives_a_smaller_last_batch(one_round_at_a_time):
    collector, sampler = make(
        [MIXED, WRONG, MIXED, RIGHT, MIXED],
        length=5,
        prompts_per_step=2,
        one_round_at_a_time=one_round_at_a_time,
    )
    first = await collect(collector, sampler)
    assert positions(first.groups) == [0, 2] and not first.exhausted
    second = await collect(collector, sampler, 1)
    assert positions(second.groups) == [4] and second.exhausted
    third = await collect(collector, sampler, 2)
    assert third.groups == () and third.exhausted


async def test_carried_groups_are_trained_before_the_run_ends():
    collector, sampler = make(length=6, one_round_at_a_time=True, max_age=1)
    believe(collector, 0.3)
    first = await collect(collector, sampler)
    assert (
        positions(first.groups) == [0, 1, 2] and not first.exhausted
    )  # all 6 were sampled and the data has ended
    second = await collect(collector, sampler, 1)
    assert positions(second.groups) == [3, 4, 5] and second.exhausted and len(sampler.started) == 6


# --- failures and restarts --------------------------------------------------------------


@pytest.mark.parametrize("one_round_at_a_time", [False, True])
async def test_a_dead_engine_costs_only_unfinished_groups(one_round_at_a_time):
    collector, sampler = make(
        [MIXED, WRONG, MIXED, MIXED, MIXED], prompts_per_step=4, one_round_at_a_time=one_round_at_a_time
    )
    sampler.delays = {0: 1, 1: 1, 2: 10, 3: 20}
    sampler.failures = {2: EngineDied("gone")}
    with pytest.raises(EngineDied, match="gone"):
        await collect(collector, sampler)
    assert sampler.running == 0
    before, sampler.started = set(sampler.finished), []
    assert before >= {0, 1} and (not one_round_at_a_time or before == {0, 1, 3})
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [0, 2, 3, 4]
    assert not before & set(sampler.started), "a finished group was sampled again"
    assert collected.counts["groups_sampled"] == len(collected.sampled) >= 5


@pytest.mark.parametrize("failing", [0, 3, 7])
async def test_in_rounds_a_dead_engine_changes_nothing(failing):
    """The batch, the counts and the next step are those of a run whose engine lived."""
    script = [random.Random(f"death/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
    options = {"prompts_per_step": 6, "max_prompts": 60, "max_age": 1, "one_round_at_a_time": True}
    collector, sampler = make(script, **options)
    expected = [await collect(collector, sampler, step) for step in range(3)]

    collector, sampler = make(script, **options)
    sampler.failures = {failing: EngineDied("gone")}
    sampler.delays = {position: position % 7 + 1 for position in range(300)}
    with pytest.raises(EngineDied):
        await collect(collector, sampler)
    assert [await collect(collector, sampler, step) for step in range(3)] == expected


async def test_failures_of_many_at_once_keep_those_that_finished_beside_them():
    collector, sampler = make(prompts_per_step=4)
    sampler.failures = {0: EngineDied("a"), 2: EngineDied("b")}
    with pytest.raises(EngineDied):
        await collect(collector, sampler)
    assert sorted(sampler.finished) == [1, 3]
    sampler.started = []
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [0, 1, 2, 3]
    assert sorted(sampler.started) == [0, 2]


async def test_a_request_that_cancels_itself_does_not_lose_its_neighbours():
    collector, sampler = make(prompts_per_step=3)
    sampler.failures = {0: asyncio.CancelledError()}
    with pytest.raises(asyncio.CancelledError):
        await collect(collector, sampler)
    sampler.started = []
    assert positions((await collect(collector, sampler)).groups) == [0, 1, 2]
    assert sampler.started == [0]


async def test_cancelling_keeps_finished_groups_and_stops_requests():
    collector, sampler = make()
    sampler.held = {1}
    task = asyncio.ensure_future(collector.collect(0))
    while len(sampler.finished) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sampler.running == 0 and 1 in sampler.cancelled
    sampler.held, sampler.started = set(), []
    assert positions((await collect(collector, sampler)).groups) == [0, 1, 2]
    assert 0 not in sampler.started and 2 not in sampler.started


@pytest.mark.parametrize("max_age", [0, 1, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
async def test_a_resumed_collector_continues_exactly(max_age, stop_after):
    """state() and the prompt cursor after any step, in a new collector: the same steps follow."""
    script = [random.Random(f"resume/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
    options = {"prompts_per_step": 4, "max_prompts": 60, "max_age": max_age, "one_round_at_a_time": True}
    collector, sampler = make(script, **options)
    whole = []
    for step in range(6):
        if step == stop_after:
            state, cursor = collector.state(), sampler.stream.position
        whole.append(await collect(collector, sampler, step))

    collector, sampler = make(script, **options)
    collector.load_state(state)
    sampler.stream.position = cursor
    again = [await collect(collector, sampler, step) for step in range(stop_after, 6)]
    assert again == whole[stop_after:]


@pytest.mark.parametrize("max_age", [0, 1, 2])
@pytest.mark.parametrize("ticks", [0, 3, 10, 25])
async def test_a_step_given_up_on_a_signal_is_not_begun(max_age, ticks):
    """SIGTERM in the middle of a step: the checkpoint after it resumes to what would have been collected."""
    script = [random.Random(f"signal/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
    options = {"prompts_per_step": 4, "max_prompts": 60, "max_age": max_age, "one_round_at_a_time": True}

    async def up_to_step_3(collector, sampler):
        return [await collect(collector, sampler, step) for step in range(3)]

    collector, sampler = make(script, **options)
    await up_to_step_3(collector, sampler)
    expected = [await collect(collector, sampler, step) for step in (3, 4)]

    collector, sampler = make(script, **options)
    await up_to_step_3(collector, sampler)
    sampler.version = 3
    sampler.delays = {position: 6 if position % 2 else 1000 for position in range(300)}
    task = asyncio.ensure_future(collector.collect(3))
    for _ in range(ticks):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    state, cursor = collector.state(), sampler.stream.position

    collector, sampler = make(script, **options)
    collector.load_state(state)
    sampler.stream.position = cursor
    assert [await collect(collector, sampler, step) for step in (3, 4)] == expected


async def aged_with_some_left_running() -> tuple[Collector, Sampler]:
    """After step 5: 3 and 5 are finished and kept, 4, 6, 7 and 8 run under version 5."""
    collector, sampler = make(max_age=1)
    believe(collector, 0.5)  # 9 go out for 3
    sampler.delays = {0: 5, 3: 1, 5: 1} | {position: 20 for position in (4, 6, 7, 8)}
    await collect(collector, sampler, 5)
    assert carried(collector.state()) == [3, 5]
    return collector, sampler


async def test_a_request_that_fails_between_two_steps_is_made_again():
    collector, sampler = await aged_with_some_left_running()
    sampler.failures = {4: EngineDied("gone")}
    for _ in range(25):
        await asyncio.sleep(0)
    with pytest.raises(EngineDied):
        await collect(collector, sampler, 6)
    collected = await collect(collector, sampler, 6)
    assert positions(collected.groups) == [3, 4, 5]
    assert [group.weight_version for group in collected.groups] == [5, 6, 5]
    assert collected.counts["carried"] == 2 and sampler.started.count(4) == 2


async def test_a_stop_between_two_steps_keeps_nothing_rather_than_the_short_ones():
    collector, sampler = await aged_with_some_left_running()
    await collector.stop()
    assert sampler.running == 0 and sorted(sampler.cancelled) == [4, 6, 7, 8]
    assert carried(collector.state()) == [] and waiting(collector.state()) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(20))
async def test_random_runs_keep_the_balance(seed):
    """Any options, timing and engine deaths: every step ends or says why, no prompt is lost or trained on
    twice.
    """
    chance = random.Random(f"balance/{seed}")
    script = [chance.choice([RIGHT, WRONG, MIXED, 1, 3]) for _ in range(3000)]
    collector, sampler = make(
        script,
        one_round_at_a_time=chance.random() < 0.3,
        prompts_per_step=chance.randrange(1, 9),
        max_prompts=chance.randrange(20, 60),
        max_age=chance.randrange(4),
        on_cap="train_smaller_batch",
        adaptive=chance.random() < 0.5,
        low=chance.choice([0.0, 0.3]),
    )
    trained: list[int] = []
    settled: set[int] = set()
    balance = 0
    for step in range(12):
        sampler.delays = {position: chance.randrange(1, 30) for position in range(3000)}
        sampler.failures = {chance.randrange(200): EngineDied("gone") for _ in range(chance.randrange(3))}
        errors = deque(range(10))
        while True:
            try:
                collected = await collect(collector, sampler, step)
                break
            except EngineDied:
                errors.pop()
        trained += positions(collected.groups)
        counts, max_age = collected.counts, collector.config.max_age
        assert counts["overdue"] == sum(step - group.weight_version > max_age for group in collected.groups)
        assert counts.get("carried", 0) == balance
        balance = counts.get("carried_over", 0)
        settled |= {*positions(collected.groups), *positions(collected.sampled)}
        left = {slot.prompt.position for slot in collector.state()["slots"]}
        assert settled | left == set(range(sampler.stream.position)), "a prompt was lost"
    assert len(set(trained)) == len(trained), "a prompt was trained on twice"


async def test_a_strict_run_that_goes_on_from_an_aged_one_samples_all_anew():
    collector, sampler = make(max_age=0)
    collector.load_state(state_of(waiting=[4], carried=[5, 6, 7]))
    sampler.stream.position = 8
    groups = (await collect(collector, sampler, 9)).groups
    assert positions(groups) == [4, 5, 6] and {group.weight_version for group in groups} == {9}
