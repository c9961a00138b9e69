"""Dynamic sampling against a scripted sampler: no server, and time is a list of who finishes when."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from megatron_dapo.config import SamplingConfig
from megatron_dapo.rollout.collect import Collected, Collector, SamplingCapReached
from megatron_dapo.rollout.engine import EngineDied
from megatron_dapo.types import Completion, Group, Prompt

G = 4
MIXED, RIGHT, WRONG = 2, G, 0


def make_prompt(position: int) -> Prompt:
    return Prompt(position=position, row=position, text=f"p{position}", answer="1", tokens=(1, 2))


def make_group(prompt: Prompt, correct: int, version: int) -> Group:
    completion = Completion(tokens=(5,), logprobs=(-1.0,), finish_reason="stop", weight_version=version)
    grades = tuple(i < correct for i in range(G))
    return Group(prompt=prompt, completions=(completion,) * G, correct=grades, rewards=tuple(1.0 if g else -1.0 for g in grades))


@dataclass
class Stream:
    """`length` prompts (endless without it), and how many of each prompt's completions are right."""

    correct: list[int] = field(default_factory=list)  # by position; MIXED beyond its end
    length: float = float("inf")
    position: int = 0

    def next(self) -> Prompt | None:
        if self.position >= self.length:
            return None
        self.position += 1
        return make_prompt(self.position - 1)

    def correct_of(self, position: int) -> int:
        return self.correct[position] if position < len(self.correct) else MIXED


@dataclass
class Sampler:
    """Answers by script; `delays[position]` ticks of the event loop, `failures` are raised once each, `held` ones never finish."""

    stream: Stream
    version: int = 0
    delays: dict[int, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: int = 0

    async def __call__(self, prompt: Prompt) -> Group:
        position, version = prompt.position, self.version
        self.started.append(position)
        self.running += 1
        try:
            for _ in range(self.delays.get(position, 1)):
                await asyncio.sleep(0)
            if position in self.failures:
                raise self.failures.pop(position)
            if position in self.held:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(position)
            raise
        finally:
            self.running -= 1
        self.finished.append(position)
        return make_group(prompt, self.stream.correct_of(position), version)


def make(correct: list[int] = (), *, length: float = float("inf"), waves: bool = False, **config) -> tuple[Collector, Sampler]:
    stream = Stream(list(correct), length)
    sampler = Sampler(stream)
    options = {"prompts_per_step": 3, "samples_per_prompt": G, "max_age": 0} | config
    return Collector(prompts=stream, sample=sampler, config=SamplingConfig(**options), waves=waves), sampler


async def collect(collector: Collector, sampler: Sampler, version: int = 0) -> Collected:
    """One step; a collector that hangs or spins fails the test, and nothing may be left running behind it."""
    sampler.version = version
    async with asyncio.timeout(5):
        collected = await collector.collect(version)
    assert sampler.running == 0
    check_conservation(collected)
    return collected


def check_conservation(collected: Collected) -> None:
    """Every group is counted by exactly one reason, and the counts are those of the groups."""
    counts = collected.counts
    assert counts.get("groups_accepted", 0) == len(collected.groups)
    assert counts.get("groups_sampled", 0) == len(collected.sampled)
    reasons = ("groups_accepted", "all_correct", "all_wrong", "outside_window", "carried_over", "surplus_dropped")
    known = {"groups_sampled", "carried", "expired", "aborted", *reasons}
    assert counts.keys() <= known, f"count without a place in the balance: {counts.keys() - known}"
    came = counts.get("groups_sampled", 0) + counts.get("carried", 0)
    assert came == sum(counts.get(reason, 0) for reason in reasons), counts


def positions(groups) -> list[int]:
    return [group.prompt.position for group in groups]


def informative_prefix(stream: Stream, start: int, number: int) -> list[int]:
    return list(itertools.islice((p for p in itertools.count(start) if 0 < stream.correct_of(p) < G), number))


# --- order ---------------------------------------------------------------------------------------------------------------


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
    """On-policy, no verdict may be lost or doubled over steps when nothing informative is dropped without being put back."""
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
async def test_in_waves_nothing_at_all_depends_on_timing(script, max_age):
    """Batches, counts, all sampled groups and the state between steps, over four steps, for any delays."""

    async def run(seed: int) -> list:
        correct = [random.Random(f"{script}/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
        collector, sampler = make(correct, waves=True, prompts_per_step=4, max_prompts=60, max_age=max_age)
        chance = random.Random(seed)
        sampler.delays = {position: chance.randrange(1, 50) for position in range(300)}
        return [(await collect(collector, sampler, step), collector.state()) for step in range(4)]

    first = await run(0)
    for seed in range(1, 8):
        assert await run(seed) == first


# --- ahead of need -------------------------------------------------------------------------------------------------------


async def test_requests_run_ahead_by_the_pass_rate():
    """Hand-computed: after 10 all-wrong groups the pass rate is 0.9^10 = 0.3487; 3 missing groups need ceil(3 / 0.3487) = 9."""
    collector, sampler = make([WRONG] * 10, max_prompts=100)
    collector.load_state(collector.state() | {"pass_rate": 0.9**10})
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


async def test_a_wave_is_waited_for_before_the_next_one():
    collector, sampler = make([WRONG], waves=True)
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


# --- surplus: aborted, carried over, dropped -----------------------------------------------------------------------------


async def test_aborted_prompts_come_first_in_the_next_step_in_order():
    collector, sampler = make([WRONG, MIXED, MIXED, MIXED])
    collector.load_state(collector.state() | {"pass_rate": 0.5})  # 6 prompts go out for 3 groups
    sampler.held = {4, 5}
    first = await collect(collector, sampler)
    assert positions(first.groups) == [1, 2, 3]
    assert sampler.cancelled and first.counts["aborted"] == len(sampler.cancelled)
    aborted = sorted(sampler.cancelled)
    assert positions_of_state(collector) == aborted and aborted[:2] == [4, 5]

    sampler.held, sampler.started = set(), []
    second = await collect(collector, sampler, 1)
    assert sampler.started[: len(aborted)] == aborted
    assert positions(second.groups) == [4, 5, 6]


def positions_of_state(collector: Collector) -> list[int]:
    return [prompt.position for prompt in collector.state()["waiting"]]


async def surplus(max_age: int, **config) -> tuple[Collector, Sampler, Collected]:
    """A step that accepts 0, 1, 2 and has 3, 4, 5 finished too, all informative but 4."""
    collector, sampler = make([MIXED] * 4 + [WRONG], waves=True, max_age=max_age, **config)
    collector.load_state(collector.state() | {"pass_rate": 0.5})
    collected = await collect(collector, sampler, 10)
    assert positions(collected.groups) == [0, 1, 2]
    assert sampler.finished == [0, 1, 2, 3, 4, 5]
    return collector, sampler, collected


async def test_on_policy_drops_the_surplus_counts_it_and_asks_again():
    collector, sampler, collected = await surplus(0)
    assert collected.counts["surplus_dropped"] == 2 and collected.counts["all_wrong"] == 1
    assert collector.state()["carried"] == [] and positions_of_state(collector) == [3, 5]
    sampler.started = []
    second = await collect(collector, sampler, 11)
    assert sampler.started[:2] == [3, 5]
    assert positions(second.groups) == [3, 5, 6]
    assert {group.weight_version for group in second.groups} == {11}


async def test_surplus_is_carried_with_its_version_and_trained_first():
    collector, sampler, collected = await surplus(1)
    assert collected.counts["carried_over"] == 2
    assert positions(collector.state()["carried"]) == [3, 5] and positions_of_state(collector) == []
    sampler.started = []
    second = await collect(collector, sampler, 11)
    assert second.counts["carried"] == 2
    assert positions(second.groups) == [3, 5, 6]
    assert [group.weight_version for group in second.groups] == [10, 10, 11]
    assert 3 not in sampler.started and 5 not in sampler.started
    assert positions(second.sampled) == sorted(sampler.started)  # carried groups were counted when they were sampled


@pytest.mark.parametrize(("max_age", "age", "expires"), [(1, 1, False), (1, 2, True), (2, 2, False), (2, 3, True)])
async def test_carried_groups_expire_by_their_age_in_steps(max_age, age, expires):
    collector, sampler, _ = await surplus(max_age)
    sampler.started = []
    second = await collect(collector, sampler, 10 + age)
    assert second.counts.get("expired", 0) == (2 if expires else 0)
    assert second.counts.get("carried", 0) == (0 if expires else 2)
    assert positions(second.groups) == [3, 5, 6]  # sampled anew, in their old place
    assert [group.weight_version for group in second.groups[:2]] == [10 + age if expires else 10] * 2
    assert (3 in sampler.started) == expires


async def test_a_carried_group_waits_for_the_prompts_before_it():
    """4 was aborted, 5 is finished and carried: 5 may only be accepted after 4 is known."""
    collector, sampler = make(max_age=1)
    waiting, carried = [make_prompt(4)], [make_group(make_prompt(p), MIXED, 0) for p in (5, 6, 7, 8)]
    collector.load_state({"waiting": waiting, "carried": carried, "pass_rate": 1.0})
    sampler.stream.position = 9
    sampler.delays = {4: 50}
    collected = await collect(collector, sampler, 1)
    assert positions(collected.groups) == [4, 5, 6]
    assert sampler.started == [4]
    assert positions(collector.state()["carried"]) == [7, 8]


async def test_enough_carried_groups_need_no_request():
    collector, sampler = make(max_age=1)
    carried = [make_group(make_prompt(p), MIXED, 0) for p in range(4)]
    collector.load_state({"waiting": [], "carried": carried, "pass_rate": 1.0})
    collected = await collect(collector, sampler, 1)
    assert positions(collected.groups) == [0, 1, 2] and sampler.started == []
    assert positions(collector.state()["carried"]) == [3]


# --- caps, windows and the end of the data -------------------------------------------------------------------------------


@pytest.mark.parametrize("waves", [False, True])
async def test_the_cap_is_an_error_that_teaches(waves):
    collector, sampler = make([RIGHT, WRONG, WRONG, MIXED] + [WRONG] * 20, max_prompts=8, waves=waves)
    with pytest.raises(SamplingCapReached) as error:
        await collect(collector, sampler)
    assert len(sampler.started) == 8 and sampler.running == 0
    for words in ("only 1 of", "prompts_per_step=3", "max_prompts=8", "1 all correct", "6 all wrong", "on_cap"):
        assert words in str(error.value)


async def test_the_cap_can_train_a_smaller_batch():
    collector, sampler = make([WRONG, MIXED, WRONG, MIXED] + [WRONG] * 20, max_prompts=8, on_cap="train_smaller_batch")
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
    """Prompts 0..3 wait, the cap lets only 0, 1, 2 out, and 4 is carried: it can not be trained on before 3, nor vanish."""
    collector, sampler = make([MIXED, WRONG, WRONG], max_prompts=3, on_cap="train_smaller_batch", max_age=2)
    carried = [make_group(make_prompt(4), MIXED, 0)]
    collector.load_state({"waiting": [make_prompt(p) for p in range(4)], "carried": carried, "pass_rate": 1.0})
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


@pytest.mark.parametrize("waves", [False, True])
async def test_the_end_of_the_data_gives_a_smaller_last_batch(waves):
    collector, sampler = make([MIXED, WRONG, MIXED, RIGHT, MIXED], length=5, prompts_per_step=2, waves=waves)
    first = await collect(collector, sampler)
    assert positions(first.groups) == [0, 2] and not first.exhausted
    second = await collect(collector, sampler, 1)
    assert positions(second.groups) == [4] and second.exhausted
    third = await collect(collector, sampler, 2)
    assert third.groups == () and third.exhausted


async def test_carried_groups_are_trained_before_the_run_ends():
    collector, sampler = make(length=6, waves=True, max_age=1)
    collector.load_state(collector.state() | {"pass_rate": 0.3})
    first = await collect(collector, sampler)
    assert positions(first.groups) == [0, 1, 2] and not first.exhausted  # all 6 were sampled and the data has ended
    second = await collect(collector, sampler, 1)
    assert positions(second.groups) == [3, 4, 5] and second.exhausted and len(sampler.started) == 6


# --- failures and restarts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waves", [False, True])
async def test_a_dead_engine_costs_only_unfinished_groups(waves):
    collector, sampler = make([MIXED, WRONG, MIXED, MIXED, MIXED], prompts_per_step=4, waves=waves)
    sampler.delays = {0: 1, 1: 1, 2: 10, 3: 20}
    sampler.failures = {2: EngineDied("gone")}
    with pytest.raises(EngineDied, match="gone"):
        await collect(collector, sampler)
    assert sampler.running == 0
    before, sampler.started = set(sampler.finished), []
    assert before >= {0, 1} and (not waves or before == {0, 1, 3})
    collected = await collect(collector, sampler)
    assert positions(collected.groups) == [0, 2, 3, 4]
    assert not before & set(sampler.started), "a finished group was sampled again"
    assert collected.counts["groups_sampled"] == len(collected.sampled) >= 5


@pytest.mark.parametrize("failing", [0, 3, 7])
async def test_in_waves_a_dead_engine_changes_nothing(failing):
    """The batch, the counts and the next step are those of a run whose engine lived."""
    script = [random.Random(f"death/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
    options = {"prompts_per_step": 6, "max_prompts": 60, "max_age": 1, "waves": True}
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
    options = {"prompts_per_step": 4, "max_prompts": 60, "max_age": max_age, "waves": True}
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
    """SIGTERM in the middle of a step: the checkpoint that follows resumes to what would have been collected."""
    script = [random.Random(f"signal/{i}").choice([RIGHT, WRONG, MIXED]) for i in range(300)]
    options = {"prompts_per_step": 4, "max_prompts": 60, "max_age": max_age, "waves": True}

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


@pytest.mark.parametrize("seed", range(20))
async def test_random_runs_keep_the_balance(seed):
    """Any options, timing and engine deaths: every step ends or says why, no prompt is lost or trained on twice."""
    chance = random.Random(f"balance/{seed}")
    script = [chance.choice([RIGHT, WRONG, MIXED, 1, 3]) for _ in range(3000)]
    collector, sampler = make(
        script,
        waves=chance.random() < 0.3,
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
        assert all(step - group.weight_version <= collector.config.max_age for group in collected.groups)
        counts = collected.counts
        assert counts.get("carried", 0) + counts.get("expired", 0) == balance
        balance = counts.get("carried_over", 0)
        settled |= {*positions(collected.groups), *positions(collected.sampled)}
        left = {*positions(collector.state()["carried"]), *positions_of_state(collector)}
        assert settled | left == set(range(sampler.stream.position)), "a prompt was lost"
    assert len(set(trained)) == len(trained), "a prompt was trained on twice"
