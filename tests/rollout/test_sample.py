"""Seeds: repeatable, and never shared. Grades that are made while the group is sampled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from support.engines import ticks
from support.samples import make_completion, make_prompt

from megatron_dapo.rollout.sample import EvaluationSampling, GroupSampler, evaluation_seed, training_seed
from megatron_dapo.types import Completion, Group, Prompt, Timing


def test_training_seeds_are_those_of_earlier_releases():
    """Computed by hand: a run that is resumed samples what it would have sampled."""
    assert training_seed(0, 0, 5) == 5 * 4096
    assert training_seed(0, 7, 5) == (7 * 1_000_003 + 5) * 4096
    assert training_seed(3, 2, 1) == ((3 * 1_000_003 + 2) * 1_000_003 + 1) * 4096
    assert training_seed(282, 0, 0) == (282 * 1_000_003**2 - (1 << 48)) * 4096  # wraps at 2^48


def test_evaluation_never_shares_a_seed_with_training():
    largest = training_seed(0, 0, (1 << 48) - 1) + 4095
    assert largest < evaluation_seed(0, 0, 0) == (1 << 60) + 2048
    assert evaluation_seed(1, 2, 3) - training_seed(1, 2, 3) == (1 << 60) + 2048
    assert evaluation_seed(0, 0, (1 << 48) - 1) + 4095 < 1 << 63  # a signed 64-bit integer, as vLLM keeps it


def test_nor_the_lower_32_bits_of_one():
    """torch's CPU generator takes no more of a seed (tests/rollout/test_client.py shows it)."""
    chance = random.Random(0)
    drawn = [(chance.randrange(100), chance.randrange(1000), chance.randrange(10**6)) for _ in range(1000)]
    low = {training_seed(*values) % (1 << 32) % 4096 for values in drawn}
    assert low == {0}
    assert {evaluation_seed(*values) % (1 << 32) % 4096 for values in drawn} == {2048}


class Grading:
    """Every grade is the number of the completion; it is made while `may_end` is set."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.graded: list[int] = []  # first tokens
        self.cancelled: list[int] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def grade(self, prompt: Prompt, completion: Completion) -> int:
        self.asked.append(completion.number)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.append(completion.number)
            raise
        self.graded.append(int(completion.tokens[0]))
        return completion.number

    def group(
        self, prompt: Prompt, completions: Sequence[Completion], grades: Sequence[int], timing: Timing
    ) -> Group:
        assert [completion.number for completion in completions] == list(grades)
        return Group(
            prompt=prompt,
            completions=tuple(completions),
            correct=tuple(grade % 2 == 0 for grade in grades),
            rewards=tuple(map(float, grades)),
            timing=timing,
        )


def sampler(generate: Any, grading: Grading | None = None, **options: Any) -> GroupSampler:
    values = {"run_seed": 3, "seeded": False, "options": {}} | options
    return GroupSampler(generate=generate, grading=grading or Grading(), **values)


async def asked_for(seeded: bool) -> list[dict]:
    calls = []

    async def generate(prompt_tokens, *, seed_of, begins, arrived, **options):
        calls.append({"tokens": prompt_tokens, "seed": seed_of(2), **options})
        return [make_completion()]

    fixed = {"max_tokens": 9, "stop_token_ids": (1,)}
    made, prompt = sampler(generate, seeded=seeded, options=fixed), make_prompt(4)
    group = await made.to_train(prompt, n=16, temperature=0.7)
    assert group.prompt is prompt
    await made.to_evaluate(prompt, EvaluationSampling(n=2, temperature=0.0, top_p=0.5))
    return calls


async def test_a_group_is_asked_for_by_what_it_is_sampled_for():
    fixed = {"tokens": (1, 2), "max_tokens": 9, "stop_token_ids": (1,)}
    training, evaluation = await asked_for(True)
    assert training == fixed | {
        "seed": training_seed(3, 2, 4), "n": 16, "temperature": 0.7, "top_p": 1.0, "key": 4, "began": ()
    }  # fmt: skip
    assert evaluation == fixed | {
        "seed": evaluation_seed(3, 2, 4), "n": 2, "temperature": 0.0, "top_p": 0.5, "key": None
    }  # fmt: skip


async def test_without_seeds_no_request_has_one():
    assert [call["seed"] for call in await asked_for(False)] == [None, None]


# --- grades and times


async def test_a_completion_is_graded_when_it_arrives_and_the_group_is_timed():
    """The clock: sent at 1, answered at 5, graded at 7; the second completion arrives with the answer."""
    now, grading = 1.0, Grading()

    async def generate(prompt_tokens, *, begins, arrived, **options):
        nonlocal now
        begins("engine_7")
        arrived(first := make_completion(number=0))
        await asyncio.sleep(0)
        assert grading.asked == [0]
        now = 5.0
        return [first, make_completion(number=1)]

    grading.may_end.clear()
    made = sampler(generate, grading, clock=lambda: now)
    task = asyncio.ensure_future(made.to_train(make_prompt(4), n=2, temperature=1.0))
    await ticks(5)
    assert grading.asked == [0, 1] and [c.number for c in made.answered[4]] == [0, 1]
    now = 7.0
    grading.may_end.set()
    group = await task
    assert group.timing == Timing(engine="engine_7", sent=1.0, answered=5.0, graded=7.0)
    assert group.correct == (True, False) and grading.asked == [0, 1] and not made.answered


async def test_what_a_failed_attempt_had_brought_is_forgotten():
    """The fleet makes a request again, on another engine: its completions are other ones."""
    grading = Grading()
    grading.may_end.clear()

    async def generate(prompt_tokens, *, begins, arrived, **options):
        begins("engine_0")
        arrived(make_completion((9, 9), number=1))
        await asyncio.sleep(0)
        begins("engine_1")
        await ticks(2)
        assert grading.cancelled == [1]
        grading.may_end.set()
        return [make_completion((5,), number=i) for i in range(2)]

    group = await sampler(generate, grading).to_train(make_prompt(4), n=2, temperature=1.0)
    assert [list(completion.tokens) for completion in group.completions] == [[5], [5]]
    assert grading.asked == [1, 0, 1]
    assert group.timing is not None and group.timing.engine == "engine_1"


async def test_the_completions_that_are_returned_are_the_ones_that_are_graded():
    grading = Grading()

    async def generate(prompt_tokens, *, begins, arrived, **options):
        begins("engine_0")
        arrived(make_completion((9, 9), number=0))
        return [make_completion((5,), number=0)]

    await sampler(generate, grading).to_train(make_prompt(4), n=1, temperature=1.0)
    assert grading.graded == [5]


async def test_a_request_that_is_given_up_ends_the_grades_that_are_being_made():
    grading = Grading()
    grading.may_end.clear()

    async def generate(prompt_tokens, *, begins, arrived, **options):
        begins("engine_0")
        arrived(make_completion())
        await asyncio.Event().wait()

    task = asyncio.ensure_future(sampler(generate, grading).to_train(make_prompt(), n=2, temperature=1.0))
    await ticks(5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ticks(2)
    assert grading.cancelled == [0]
