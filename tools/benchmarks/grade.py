"""Answers a second through the grading pool, of one worker."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Sequence

from megatron_dapo.reward.pool import GradingPool

RULES = ("dapo", "auto", "math_verify")
GROUP = 16
TIMEOUT_S = 60.0

Group = tuple[list[str], str]  # responses and their answer


def make_groups(number: int, seed: int = 0) -> list[Group]:
    """Groups of a training step: four of five answers are integers, the others fractions and expressions.
    Half of the responses are right, some in another spelling; the wrong ones are few different ones.
    """
    draw = random.Random(seed)
    groups: list[Group] = []
    for index in range(number):
        n = draw.randint(2, 10**4)
        if index % 5:
            spellings, wrong = [f"{n}", f"${n}$", f"\\boxed{{{n}}}"], [f"{n + k}" for k in range(1, 5)]
        elif index % 2:
            spellings = [f"$\\frac{{{n}}}{{7}}$", f"\\boxed{{\\frac{{{n}}}{{7}}}}", f"{n}/7"]
            wrong = [f"$\\frac{{{n}}}{{9}}$", f"\\boxed{{{n}}}"]
        else:
            spellings = [f"$x^2+{n}$", f"$x^2 + {n}$", f"\\boxed{{{n}+x^2}}"]
            wrong = [f"$x^2-{n}$", "\\boxed{x}"]
        answer = spellings[0].strip("$")
        responses = []
        for _ in range(GROUP):
            right = draw.random() < 0.5
            said = draw.choices(spellings, [8, 4, 1])[0] if right else draw.choice(wrong)
            steps = "We add both sides and find that $a = b + 1$, so the sum is larger. " * draw.randint(
                2, 30
            )
            responses.append(f"{steps}\nAnswer: {said}")
        groups.append((responses, answer))
    return groups


def run(args: argparse.Namespace) -> dict:
    """The best of args.repeats for each rule: other work on the machine only takes away."""
    numbers = {"dapo": args.groups, "auto": args.groups, "math_verify": max(1, args.groups // 10)}
    rates = {}
    for rule in RULES:
        # New numbers each time: nothing may be known from the time before.
        samples = [make_groups(numbers[rule], seed) for seed in range(args.repeats)]
        rates[rule] = asyncio.run(_best(rule, samples))
    return {
        "answers_per_second": {rule: round(rate, 1) for rule, rate in rates.items()},
        "auto_over_math_verify": round(rates["auto"] / rates["math_verify"], 2),
        "dapo_over_auto": round(rates["dapo"] / rates["auto"], 2),
    }


async def _best(rule: str, samples: Sequence[list[Group]]) -> float:
    with GradingPool(rule, 1, TIMEOUT_S) as pool:
        await pool.grade(["Answer: 1"], "2")
        return max([await _rate(pool, groups) for groups in samples])


async def _rate(pool: GradingPool, groups: list[Group]) -> float:
    start = time.perf_counter()
    grades = await asyncio.gather(*(pool.grade(responses, answer) for responses, answer in groups))
    seconds = time.perf_counter() - start
    ungraded = [grade for grade in itertools.chain(*grades) if grade.correct is None]
    assert not ungraded, ungraded[:3]
    return GROUP * len(groups) / seconds
