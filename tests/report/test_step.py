"""Waste, ages and grading of a step, by hand."""

from __future__ import annotations

import dataclasses

from support.samples import make_group, make_prompt, make_sample

from megatron_dapo.batching.packing import pack
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.report.step import step_metrics, wasted_tokens
from megatron_dapo.types import Collected, Group, GroupFacts, StepResult


def group(position: int, length: int, correct: int, version: int = 0) -> Group:
    return make_group(make_prompt(position), correct, lengths=(length,) * 2, version=version)


EASY, HARD = group(0, 10, 2), group(1, 20, 0)
TRAINED, CLOSE = group(2, 30, 1), group(3, 40, 1)
EASY_BEHIND, GOOD_BEHIND = group(4, 50, 2), group(5, 60, 1)
VERDICTS = {
    0: "all_correct",
    1: "all_wrong",
    2: "accepted",
    3: "outside_window",
    4: "all_correct",
    5: "accepted",
}


def collected(sampled, *, trained=(TRAINED,), **counts: int) -> Collected:
    facts = tuple(GroupFacts.of(g, VERDICTS[g.prompt.position]) for g in sampled)
    return Collected(groups=trained, sampled=facts, counts=counts)


def test_a_strict_step_wastes_whatever_lies_behind_its_last_group():
    last = group(3, 40, 1)
    step = collected([EASY, HARD, TRAINED, EASY_BEHIND, GOOD_BEHIND], surplus_dropped=2)
    assert wasted_tokens(step) == {"all_correct": 20, "all_wrong": 40, "surplus": 220}
    step = collected([CLOSE, TRAINED], trained=(TRAINED, last))
    assert wasted_tokens(step) == {"outside_window": 80}


def test_an_aged_step_wastes_what_a_later_step_will_pass_over():
    step = collected([EASY, TRAINED, EASY_BEHIND, GOOD_BEHIND], carried_over=2)
    assert wasted_tokens(step) == {"all_correct": 20 + 100}


def metrics(step: Collected, **changed) -> dict[str, float]:
    samples = [make_sample((3, 4, 5), prompt_length=2)] * 2
    batch = pack(samples, dp=1, num_updates=1, max_tokens=6, version=0, denominator=trained_tokens)
    result = StepResult(loss=0.0, grad_norm=1.0, num_tokens=2, num_updates=1, num_micro_batches=1, lr=1e-6)
    options = dict(version=3, reward_seconds=0.0, grades={}, request_failures={}, num_updates=1)
    return step_metrics(step, batch, result, {}, **(options | changed))


def test_ages_are_of_the_oldest_token_of_each_trained_group():
    trained = tuple(group(i, 1, 1, version=version) for i, version in enumerate((3, 3, 1, 0)))
    measured = metrics(Collected(groups=trained, sampled=(), counts={"overdue": 1}))
    assert (measured["sampling/age_mean"], measured["sampling/age_max"]) == (5 / 4, 3)
    assert measured["sampling/overdue_share"] == 0.25


def test_what_has_no_grade_is_in_no_mean():
    graded = dataclasses.replace(TRAINED, correct=(True, None), rewards=(1.0, -0.5))
    nothing = dataclasses.replace(HARD, correct=(None, None))
    facts = (GroupFacts.of(graded, "accepted"), GroupFacts.of(nothing, "ungraded"))
    measured = metrics(Collected(groups=(graded,), sampled=facts, counts={"ungraded": 1}))
    assert measured["accuracy/mean"] == measured["reward/mean"] == 1.0
    assert measured["sampling/ungraded"] == 1 and measured["tokens/wasted_ungraded"] == 40
    assert metrics(Collected(groups=(nothing,), sampled=facts[1:], counts={}))["accuracy/mean"] == 0.0


def test_tokens_and_grades_are_counted():
    step = collected([EASY, TRAINED, GOOD_BEHIND], surplus_dropped=1)
    grades = {"correct": 5, "wrong": 3, "no_answer": 4, "timeout": 2, "crashed": 1}
    measured = metrics(step, grades=grades)
    assert measured["tokens/generated"] == 20 + 60 + 120
    assert measured["tokens/wasted_all_correct"] == 20 and measured["tokens/wasted_surplus"] == 120
    assert measured["tokens/wasted_all_wrong"] == measured["tokens/wasted_outside_window"] == 0
    assert {name: measured[f"reward/{name}"] for name in grades} == grades
    assert measured["accuracy/mean"] == (1 + 0.5 + 0.5) / 3
