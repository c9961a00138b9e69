"""How many prompts are under way: hand-computed needs, and launches per step against what was needed."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from support.collecting import MIXED, RIGHT, WRONG, G, make
from support.samples import make_group, make_prompt
from support.simulated import Simulation, outcomes

from megatron_dapo.rollout.need import PassRate, prompts_needed, running_needed
from megatron_dapo.types import Group, Prompt


@pytest.mark.parametrize(
    ("groups", "rate", "prompts"),
    [
        (0, 0.5, 0),
        (-3, 0.5, 0),
        (7, 1.0, 7),
        (1, 0.5, 4),  # 4 / 2 - sqrt(4 / 4) = 1
        (3, 0.5, 9),  # 9 / 2 - sqrt(9 / 4) = 3
        (12, 0.2, 78),  # 78 / 5 - sqrt(78 * 0.16) = 12.07; 77 give 11.89
    ],
)
def test_needed_prompts_have_one_standard_deviation_on_the_safe_side(groups, rate, prompts):
    assert prompts_needed(groups, rate) == prompts


def test_the_posterior_weighs_a_step_half_of_the_next():
    """Beta(1, 1), 40 of 100 in the last step (half of them count) and 10 of 100 in the one before (a
    quarter): (1 + 20 + 2.5) / (2 + 50 + 25).
    """
    rate = PassRate()
    assert rate.mean(0, 0) == 0.5 and rate.optimistic(0, 0) == 1.0
    rate.end_step(10, 100)
    rate.end_step(40, 100)
    assert rate.mean(0, 0) == pytest.approx(23.5 / 77)
    assert rate.mean(7, 10) == pytest.approx(30.5 / 87)
    assert rate.mean(0, 0) < rate.optimistic(0, 0) < rate.mean(0, 0) + 2 * 0.053  # sqrt(0.305 * 0.695 / 78)


def test_verdicts_behind_a_running_prompt_count_by_the_share_that_is_in():
    """Rate 1, goal 4: 3 behind, 1 of them informative. All in: 3 more. With 3 running: a quarter of that
    weight, the other three quarters by the rate: 0.25 x 3 + 0.75 x 1 = 1.5.
    """
    known = {"goal": 4, "rate": 1.0, "accepted": 0, "informative": 1, "behind": 3}
    assert running_needed(running=0, **known) == 3
    assert running_needed(running=3, **known) == 2


@pytest.mark.parametrize(
    ("pass_rates", "longer"), [((0.4, 0.4), 0.4), ((0.4, 0.4), 1.0), ((0.9, 0.2), 0.4), ((0.9, 0.2), 3.0)]
)
def test_launches_stay_within_a_fifth_of_what_was_needed(pass_rates, longer):
    """Also where uninformative groups are the short ones (0.4). K = 512 and pass rate 0.4 took 2,063 to 3,077
    prompts instead of 1,280 when the rate remembered ten groups.
    """
    outcome = outcomes("need", pass_rates=pass_rates, longer=longer, ticks=4)
    for collected in Simulation(outcome=outcome, prompts_per_step=512, concurrency=800).run(3):
        counts = collected.counts
        reached = sum(counts.get(name, 0) for name in ("groups_accepted", "all_correct", "all_wrong"))
        launched = counts["groups_sampled"] + counts.get("aborted", 0)
        assert launched <= 1.2 * reached


@pytest.mark.parametrize("longer", [1.0, 3.0])
def test_admission_bounds_the_age(longer):
    """As much ahead as max_age allows, lengths of all kinds: what is older is the rare exception."""
    outcome = outcomes("age", pass_rates=(0.5, 0.5), longer=longer)
    steps = Simulation(outcome=outcome, prompts_per_step=64, max_age=2, run_ahead=None, concurrency=60).run(
        20
    )
    ages = [step - group.weight_version for step, done in enumerate(steps) for group in done.groups]
    assert max(ages) <= 3 and sum(age > 2 for age in ages) < 0.02 * len(ages)
    assert sum(age >= 1 for age in ages) > 0.5 * len(ages)  # it does run ahead


async def test_bookkeeping_of_15360_prompts_takes_less_than_two_seconds():
    """The budget of DESIGN 9, with tasks and futures in it, in any order of completion and with the first
    prompt finishing last: a scan of all slots for each completion takes minutes.
    """
    number, waiting = 15_360, dict[int, asyncio.Future[Group]]()
    chance = random.Random(0)
    correct = [MIXED if chance.random() < 0.1 else chance.choice([RIGHT, WRONG]) for _ in range(number)]
    collector, sampler = make(
        correct, prompts_per_step=1536, max_prompts=number, on_cap="train_smaller_batch"
    )
    groups = [make_group(make_prompt(i), correct[i], size=G, version=0) for i in range(number)]

    async def sample(prompt: Prompt, began: object) -> Group:
        waiting[prompt.position] = asyncio.get_running_loop().create_future()
        return await waiting[prompt.position]

    collector.sample = sample
    task = asyncio.ensure_future(collector.collect(0))
    spent = 0.0
    while not task.done():
        for _ in range(3):
            await asyncio.sleep(0)  # the collector starts what it needs
        order = [position for position in waiting if position != 0] or list(waiting)
        chance.shuffle(order)
        began = time.process_time()
        for position in order:
            waiting.pop(position).set_result(groups[position])
            for _ in range(3):
                await asyncio.sleep(0)
        spent += time.process_time() - began
    collected = await task
    assert sum(collected.counts.get(name, 0) for name in ("groups_sampled", "aborted")) > 0.9 * number
    assert spent < 2, f"{spent:.1f} s"
