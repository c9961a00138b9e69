"""Which groups become a batch, in which order, and what happens to the surplus."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random

import numpy as np
import pytest
from support.collecting import (
    MIXED,
    RIGHT,
    WRONG,
    G,
    Sampler,
    believe,
    carried,
    collect,
    informative_prefix,
    make,
    positions,
    state_of,
    waiting,
)
from support.samples import make_group, make_prompt

from megatron_dapo.rollout.collect import Collector
from megatron_dapo.types import Collected, Group, GroupFacts, Partial, Timing

# --- order ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_acceptance_is_in_prompt_order_whatever_finishes_first(order):
    collector, sampler = make()
    sampler.delays = {position: 5 * (rank + 1) for rank, position in enumerate(order)}
    collected = await collect(collector, sampler)
    assert sampler.finished == list(order)
    assert positions(collected.groups) == [0, 1, 2]


async def test_a_slow_prompt_is_waited_for_although_enough_others_are_informative():
    collector, sampler = make([MIXED, WRONG, MIXED, MIXED, MIXED])
    sampler.delays = {0: 200}
    collected = await collect(collector, sampler)
    assert sampler.finished[-1] == 0
    assert positions(collected.groups) == [0, 2, 3]


async def test_uninformative_groups_are_dropped_and_counted():
    collector, sampler = make([RIGHT, MIXED, WRONG, RIGHT, MIXED, 1, 3])
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [1, 4, 5]
    counts = collected.counts
    assert (counts["all_correct"], counts["all_wrong"], counts["groups_accepted"]) == (2, 1, 3)


async def test_without_dynamic_sampling_every_group_is_accepted():
    collector, sampler = make([RIGHT, WRONG, MIXED], dynamic=False)
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [0, 1, 2]
    assert collected.counts["groups_sampled"] == 3


@pytest.mark.parametrize("seed", range(30))
async def test_batches_are_the_informative_prompts_in_order_under_any_timing(seed):
    """On-policy, no verdict may be lost or doubled over steps when nothing informative is dropped without
    being put back.
    """
    chance = random.Random(seed)
    correct = [chance.choice([RIGHT, WRONG, MIXED, 1]) for _ in range(400)]
    collector, sampler = make(correct, prompts_per_step=4, max_prompts=60)
    sampler.delays = {position: chance.randrange(1, 40) for position in range(400)}
    trained = []
    for step in range(8):
        collected = await collect(collector, sampler, step)
        assert len(collected.groups) == 4
        assert all(group.weight_version == step for group in collected.groups)
        trained += positions(collected.groups)
    assert trained == informative_prefix(sampler.stream, 0, 32)


@pytest.mark.parametrize("max_age", [0, 1, 3])
@pytest.mark.parametrize("script", range(5))
async def test_in_rounds_nothing_at_all_depends_on_timing(script, max_age):
    """Batches, counts, all sampled groups and the state between steps, over four steps, for any delays."""

    async def run(seed: int) -> list:
        correct = [random.Random(f"{script}/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
        collector, sampler = make(
            correct, one_round_at_a_time=True, prompts_per_step=4, max_prompts=60, max_age=max_age
        )
        chance = random.Random(seed)
        sampler.delays = {position: chance.randrange(1, 50) for position in range(300)}
        return [(await collect(collector, sampler, step), collector.state()) for step in range(4)]

    first = await run(0)
    for seed in range(1, 8):
        assert await run(seed) == first


# --- ahead of need ----------------------------------------------------------------------


async def test_requests_run_ahead_by_the_pass_rate():
    """Hand-computed: 9 prompts at pass rate 1/2 give 4.5 informative groups, with standard deviation 1.5: one
    below the mean are the 3 that are needed. With 8 it would be 4 - 1.41.
    """
    collector, sampler = make([WRONG] * 10, max_prompts=100)
    believe(collector, 0.5)
    sampler.held = set(range(100))
    task = asyncio.ensure_future(collector.collect(0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert sampler.started == list(range(9))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sampler.running == 0
    assert sorted(sampler.cancelled) == list(range(9))


async def test_a_finished_group_is_replaced_while_others_still_run():
    collector, sampler = make([WRONG])
    sampler.delays = {1: 100, 2: 100}
    await collect(collector, sampler)
    assert sampler.started[:3] == [0, 1, 2]
    assert 3 in sampler.finished and sampler.started.index(3) < 5  # asked for before 1 and 2 were in
    assert sampler.finished.index(3) < sampler.finished.index(1)


async def test_a_round_is_waited_for_before_the_next_one():
    collector, sampler = make([WRONG], one_round_at_a_time=True)
    sampler.delays = {1: 100, 2: 100}
    await collect(collector, sampler)
    assert sampler.finished[:3] == [0, 1, 2]
    assert sampler.finished[3:] and min(sampler.finished[3:]) == 3


async def test_progress_counts_the_accepted_in_order():
    collector, sampler = make()
    sampler.delays = {0: 30, 1: 20, 2: 10}
    seen = []
    collector.progress = lambda done, total: seen.append((done, total))
    await collect(collector, sampler)
    assert seen[0] == (0, 3) and seen[-1] == (3, 3)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done in (0, 3) for done, _ in seen)  # 0 comes last, and the other two do not count before it


# --- what lies behind the K-th accepted group ---------------------------------------------


async def behind(**config) -> tuple[Collector, Sampler, Collected]:
    """A step of version 10 that accepts 0, 1, 2. Behind them 3 and 5 are finished and informative, 4 and 6
    finished and not, 7 and 8 run.
    """
    collector, sampler = make([MIXED] * 4 + [WRONG, MIXED, RIGHT], **config)
    believe(collector, 0.5)  # 9 prompts go out for 3 groups
    sampler.delays = {0: 20}
    sampler.held = {7, 8}
    collected = await collect(collector, sampler, 10)
    assert positions(collected.groups) == [0, 1, 2]
    assert sorted(sampler.finished) == [0, 1, 2, 3, 4, 5, 6]
    sampler.held, sampler.started = set(), []
    return collector, sampler, collected


async def test_strict_all_of_it_is_put_back_and_sampled_anew_whatever_its_verdict():
    collector, sampler, first = await behind(max_age=0)
    assert sorted(sampler.cancelled) == [7, 8] and first.counts["aborted"] == 2
    assert first.counts["surplus_dropped"] == 4
    assert not first.counts.keys() & {"all_correct", "all_wrong"}  # they were not reached
    assert carried(collector.state()) == [] and waiting(collector.state()) == [3, 4, 5, 6, 7, 8]
    sampler.stream.correct[4] = MIXED  # the next policy can do it
    second = await collect(collector, sampler, 11)
    assert sampler.started[:3] == [3, 4, 5]
    assert positions(second.groups) == [3, 4, 5]
    assert {group.weight_version for group in second.groups} == {11}


async def test_aged_all_of_it_stays_and_running_requests_go_on():
    collector, sampler, first = await behind(max_age=1)
    assert sampler.cancelled == [] and first.counts["left_running"] == 2
    assert first.counts["carried_over"] == 4
    assert carried(collector.state()) == [3, 4, 5, 6] and waiting(collector.state()) == [7, 8]
    sampler.stream.correct[4] = MIXED  # too late: the group of version 10 keeps its verdict
    await collector.stop()
    second = await collect(collector, sampler, 11)
    assert positions(second.groups) == [3, 5, 7]
    assert [group.weight_version for group in second.groups] == [10, 10, 11]
    assert sampler.started == [7, 8] + list(range(9, 9 + len(sampler.started) - 2))
    counts = second.counts
    assert (counts["carried"], counts["all_wrong"], counts["all_correct"]) == (4, 1, 1)
    assert counts["overdue"] == 0


async def test_aged_a_request_that_outlives_its_step_is_trained_with_the_version_that_sampled_it():
    collector, sampler = make(max_age=1)
    believe(collector, 0.5)
    sampler.delays = {4: 100}
    await collect(collector, sampler, 10)
    assert sampler.running == 1
    second = await collect(collector, sampler, 11)
    assert positions(second.groups) == [3, 4, 5] and sampler.started.count(4) == 1
    assert [group.weight_version for group in second.groups] == [10, 10, 10]
    assert second.counts["carried"] == 5 and 4 in positions(second.sampled)


@pytest.mark.parametrize(("max_age", "age", "overdue"), [(1, 1, 0), (1, 2, 2), (2, 2, 0), (2, 3, 2)])
async def test_nothing_is_dropped_for_its_age(max_age, age, overdue):
    collector, sampler, _ = await behind(max_age=max_age)
    await collector.stop()
    second = await collect(collector, sampler, 10 + age)
    assert positions(second.groups) == [3, 5, 7]
    assert [group.weight_version for group in second.groups[:2]] == [10, 10]
    assert second.counts["overdue"] >= overdue and (second.counts["overdue"] == 0) == (overdue == 0)


async def test_requests_are_admitted_only_if_they_are_consumed_within_max_age_steps():
    """Hand-computed: K = 3 and max_age 1 allow 6 informative groups, at pass rate 1/2 of 12 prompts."""
    collector, sampler = make([MIXED, WRONG] * 50, max_age=1, max_prompts=100, run_ahead=None)
    believe(collector, 0.5)
    sampler.held = set(range(100))
    task = asyncio.ensure_future(collector.collect(0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert sampler.started == list(range(12))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_carried_group_waits_for_the_prompts_before_it():
    """4 was aborted, 5 is finished and carried: 5 may only be accepted after 4 is known."""
    collector, sampler = make(max_age=1)
    collector.load_state(state_of(waiting=[4], carried=[5, 6, 7, 8]))
    sampler.stream.position = 9
    sampler.delays = {4: 50}
    collected = await collect(collector, sampler, 1)
    assert positions(collected.groups) == [4, 5, 6]
    assert sampler.started == [4]
    assert carried(collector.state()) == [7, 8]


async def test_enough_carried_groups_need_no_request():
    collector, sampler = make(max_age=1)
    collector.load_state(state_of(carried=range(4)))
    collected = await collect(collector, sampler, 1)
    assert positions(collected.groups) == [0, 1, 2] and sampler.started == []
    assert carried(collector.state()) == [3]


# --- what is kept of a group --------------------------------------------------------------


async def test_a_group_that_no_step_can_train_on_is_kept_as_facts():
    """4 of 4 and 0 of 4 right are never trained on; 1 of 4 is outside of (0.4, 0.6)."""
    collector, sampler = make([RIGHT, WRONG, 1, MIXED, MIXED, MIXED], low=0.4, high=0.6, max_age=1)
    sampler.held = {0}
    task = asyncio.ensure_future(collector.collect(0))
    while not {1, 2, 3} <= set(sampler.finished):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    slots = collector.state()["slots"]
    assert [type(slot.result) for slot in slots[1:4]] == [GroupFacts, GroupFacts, Group]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_window_that_may_widen_keeps_what_it_may_come_to():
    """Widened, (0.4, 0.6) comes to (0, 1): 1 and 3 of 4 right are trained on then, 0 and 4 never."""
    collector, _ = make(low=0.4, high=0.6, adaptive=True)
    kept = [type(collector._filter.kept_of(make_group(make_prompt(0), correct))) for correct in range(5)]
    assert kept == [GroupFacts, Group, Group, Group, GroupFacts]
    collector, _ = make(dynamic=False)
    assert isinstance(collector._filter.kept_of(make_group(make_prompt(0), RIGHT)), Group)


async def test_the_facts_of_all_that_finished_are_told_with_their_verdicts():
    collector, _ = make([RIGHT, WRONG, 1, MIXED, 3], low=0.4, high=0.6, prompts_per_step=2)
    collected = await collect(collector, _)
    verdicts = {facts.position: facts.verdict for facts in collected.sampled}
    assert {p: verdicts[p] for p in range(6)} == {
        0: "all_correct",
        1: "all_wrong",
        2: "outside_window",
        3: "accepted",
        4: "outside_window",
        5: "accepted",
    }
    assert all(facts.lengths == (1, 1, 1, 1) for facts in collected.sampled)


async def test_a_checkpoint_of_what_runs_is_taken_by_its_beginnings():
    """3 and 5 are finished; 4 runs and has two tokens; 6 has none yet. 3 was made by an engine that is mute:
    whatever it made is sampled again.
    """
    collector, sampler = make(max_age=1)
    believe(collector, 0.5)
    sampler.delays = {0: 20}
    sampler.held = {4, 6, 7, 8}
    await collect(collector, sampler)
    began = {4: beginnings(2), 6: beginnings(0)}
    slots = {slot.prompt.position: slot for slot in collector.state(began)["slots"]}
    assert slots[4].began == began[4] and slots[6].began == () and slots[7].began == ()
    assert [position for position, slot in slots.items() if slot.result is not None] == [3, 5]
    timing = Timing(engine="engine_1", sent=0, answered=0, graded=0)
    for slot in collector._slots:
        if slot.prompt.position in (3, 5):
            assert isinstance(slot.result, Group)
            engine = {3: "engine_1", 5: "engine_0"}[slot.prompt.position]
            made_by = dataclasses.replace(timing, engine=engine)
            slot.result = dataclasses.replace(slot.result, timing=made_by)
    assert carried(collector.state(began, lost={"engine_1"})) == [5]
    other, resumed = make(max_age=1)
    other.load_state(collector.state(began))
    resumed.stream.position = 9
    assert positions((await collect(other, resumed, 1)).groups) == [3, 4, 5]
    assert resumed.started[:4] == [4, 6, 7, 8] and resumed.began == {4: began[4]}


def beginnings(tokens: int) -> tuple[Partial, ...]:
    zeros = np.zeros(tokens, np.int32)
    versions = ((0, tokens),) if tokens else ()
    return (Partial(tokens=zeros, logprobs=zeros.astype(np.float32), versions=versions),) * G
