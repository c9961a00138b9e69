"""Which groups a step accepts: windows that move, other metrics than accuracy, what is recorded of them."""

from __future__ import annotations

import asyncio
import random

import pytest
from support.collecting import MIXED, RIGHT, WRONG, collect, make, positions, state_of


async def test_the_adaptive_window_follows_the_share_of_informative_groups_both_ways():
    """(0.4, 0.6) takes 2 of 4 right, (0.2, 0.8) also 1 and 3. Half the groups are to be informative. Step 0
    consumes 8 groups for 3, step 1 with the wider window 5, of which the narrow one would have taken 2. From
    position 12 on all are 2 of 4 right, so the step after the next has the narrow one again.
    """
    narrow = {"low": 0.4, "high": 0.6, "adaptive": True, "max_prompts": 60}
    collector, sampler = make([1, MIXED, WRONG] * 4 + [MIXED] * 20, **narrow)
    steps = [await collect(collector, sampler, step) for step in range(4)]
    assert [step.window for step in steps] == [(0.4, 0.6), (0.2, 0.8), (0.2, 0.8), (0.4, 0.6)]
    assert [positions(step.groups) for step in steps[:2]] == [[1, 4, 7], [9, 10, 12]]
    fixed, sampler = make([1, MIXED, WRONG] * 4, low=0.4, high=0.6, max_prompts=60)
    windows = [(await collect(fixed, sampler, step)).window for step in range(2)]
    assert windows == [(0.4, 0.6)] * 2


@pytest.mark.parametrize("max_age", [0, 1])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
async def test_a_window_that_has_moved_is_resumed_exactly(max_age, stop_after):
    """Also when a signal ends a step that had widened it at the cap: that step counts as not begun."""
    script = [random.Random(f"window/{i}").choice([RIGHT, WRONG, 1, 3, MIXED]) for i in range(600)]
    options = {"low": 0.4, "high": 0.6, "adaptive": True, "max_prompts": 6, "max_age": max_age}
    options |= {"one_round_at_a_time": True, "prompts_per_step": 2, "on_cap": "train_smaller_batch"}
    collector, sampler = make(script, **options)
    whole = [await collect(collector, sampler, step) for step in range(9)]
    assert len({step.window for step in whole}) > 1

    collector, sampler = make(script, **options)
    for step in range(stop_after):
        await collect(collector, sampler, step)
    task = asyncio.ensure_future(collector.collect(stop_after))
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    collector._filter.widen()
    state, cursor = collector.state(), sampler.stream.position
    collector, sampler = make(script, **options)
    collector.load_state(state)
    sampler.stream.position = cursor
    assert [await collect(collector, sampler, step) for step in range(stop_after, 9)] == whole[stop_after:]


async def test_other_metrics_than_accuracy_decide():
    """All groups have rewards 1 and -1 but those of one value: 1 of 4 right has the deviation 1, 2 of 4
    1.155. By the mean, 3 of 4 right have 0.5.
    """
    collector, sampler = make([RIGHT, 1, MIXED, WRONG, 3, MIXED, 1], metric="reward_std")
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [1, 2, 4] and collected.window == (0.0, float("inf"))
    collector, sampler = make([RIGHT, 1, MIXED, WRONG, 3, MIXED, 1, 2], metric="reward_std", low=1.1)
    assert positions((await collect(collector, sampler)).groups) == [2, 5, 7]
    collector, sampler = make(
        [RIGHT, 3, MIXED, WRONG, 3, MIXED, 3, 3], metric="reward_mean", low=0.2, high=0.9
    )
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [1, 4, 6]
    assert (collected.counts["all_correct"], collected.counts["outside_window"]) == (1, 2)


async def test_the_verdicts_of_consumed_groups_are_recorded_once_in_stream_order():
    """Widening the window within a step judges its groups again, and records them once."""
    collector, sampler = make(
        [1, RIGHT, 2, WRONG, 3, 1],
        adaptive=True,
        low=0.4,
        high=0.6,
        max_prompts=6,
        on_cap="train_smaller_batch",
    )
    await collect(collector, sampler)
    assert sampler.stream.recorded == [(0, 0.25), (1, 1.0), (2, 0.5), (3, 0.0), (4, 0.75)]


async def test_no_more_prompts_are_taken_than_may_be_ahead():
    """max_prompts 4 and max_age 1 allow 8 that no step has consumed. There are 8, so none is added for the 20
    that the step wants; with 7 one is.
    """
    options = {"max_age": 1, "max_prompts": 4, "prompts_per_step": 20, "on_cap": "train_smaller_batch"}
    for number in (8, 7):
        collector, sampler = make(**options)
        collector.load_state(state_of(carried=range(number)))
        sampler.stream.position = number
        collected = await collect(collector, sampler, 1)
        assert positions(collected.groups) == list(range(8)) and sampler.stream.position == 8
