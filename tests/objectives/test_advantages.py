"""Advantages by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from support.samples import make_completion, make_prompt

from megatron_dapo.objectives.advantages import group_advantages, with_advantages
from megatron_dapo.types import Group


def group(
    rewards: list[float],
    *,
    prompt: tuple[int, ...] = (5, 6),
    masked: tuple[int, ...] = (),
    position: int = 3,
) -> Group:
    """Completion i has i + 1 tokens 10, 11, ..., was sampled by version i with seed 100 + i."""
    completions = tuple(
        make_completion(
            range(10, 11 + i),
            logprobs=[-0.5 * (j + 1) for j in range(i + 1)],
            trained=[i not in masked] * (i + 1),
            version=i,
            number=i,
            seed=100 + i,
        )
        for i in range(len(rewards))
    )
    return Group(
        prompt=make_prompt(position, tokens=prompt),
        completions=completions,
        correct=tuple(r > 0 for r in rewards),
        rewards=tuple(rewards),
    )


def test_the_sample_standard_deviation_divides():
    # mean 0, squares 1 + 1 + 1 + 1 over 3
    scale = math.sqrt(4 / 3) + 1e-6
    assert group_advantages([1, -1, 1, -1]) == pytest.approx([1 / scale, -1 / scale] * 2, rel=1e-12)
    # mean 0.5; squares 0.25 + 0.25 + 2.25 + 2.25 = 5 over 3
    scale = math.sqrt(5 / 3) + 1e-6
    assert group_advantages([1, 0, 2, -1]) == pytest.approx(
        [0.5 / scale, -0.5 / scale, 1.5 / scale, -1.5 / scale], rel=1e-12
    )


def test_only_the_mean_is_subtracted_without_normalization():
    assert group_advantages([1, 0, 2, -1], "none") == [0.5, -0.5, 1.5, -1.5]


def test_equal_rewards_have_no_advantage():
    assert group_advantages([-1.0] * 5) == [0.0] * 5


def test_another_normalization_is_refused():
    with pytest.raises(ValueError, match=r"objective\.advantage='max' must be 'std' or 'none'"):
        group_advantages([1, 0], "max")


def test_samples_are_prompt_and_response_in_order():
    samples = with_advantages([group([1, -1]), group([2, 0, 1], prompt=(7,), position=4)], normalize="none")
    assert [s.tokens.tolist() for s in samples] == [
        [5, 6, 10],
        [5, 6, 10, 11],
        [7, 10],
        [7, 10, 11],
        [7, 10, 11, 12],
    ]
    assert [s.advantages.tolist() for s in samples] == [[1] * 3, [-1] * 4, [1] * 2, [-1] * 3, [0] * 4]
    assert samples[3].response_mask.tolist() == [False, True, True]
    assert samples[3].rollout_logprobs.tolist() == [0.0, -0.5, -1.0]
    assert samples[3].tokens.dtype == torch.int32 and samples[3].advantages.dtype == torch.float32


def test_a_sample_says_which_completion_of_which_prompt_it_is():
    samples = with_advantages([group([1, -1]), group([2, 0, 1], position=4)])
    assert [s.prompt_position for s in samples] == [3, 3, 4, 4, 4]
    assert [s.number for s in samples] == [0, 1, 0, 1, 2]
    assert [s.seed for s in samples] == [100, 101, 100, 101, 102]
    assert [s.weight_version for s in samples] == [0, 1, 0, 1, 2]


def test_a_sample_counts_as_sampled_by_the_oldest_version_of_its_tokens():
    mixed = make_completion([10, 11, 12], versions=((4, 1), (5, 2)))
    groups = [Group(prompt=make_prompt(), completions=(mixed, mixed), correct=(True, False), rewards=(1, -1))]
    assert [s.weight_version for s in with_advantages(groups)] == [4, 4]


def test_a_masked_response_keeps_its_reward_in_the_mean_and_deviation():
    rewards = [1.0, -1.0, -1.0]
    samples = with_advantages([group(rewards, masked=(1,))])
    assert [bool(s.response_mask.any()) for s in samples] == [True, False, True]
    assert float(samples[0].advantages[0]) == pytest.approx((1 + 1 / 3) / (statistics.stdev(rewards) + 1e-6))


def test_a_response_without_a_grade_counts_neither_in_the_mean_nor_in_the_deviation():
    three = dataclasses.replace(group([1.0, -9.0, -1.0, -1.0]), correct=(True, None, False, False))
    samples = with_advantages([three])
    scale = statistics.stdev([1.0, -1.0, -1.0]) + 1e-6
    expected = [(1 + 1 / 3) / scale, 0.0, (-1 + 1 / 3) / scale, (-1 + 1 / 3) / scale]
    assert [float(s.advantages[0]) for s in samples] == pytest.approx(expected)


@pytest.mark.parametrize("correct", [(None, None), (True, None)])
def test_fewer_than_two_grades_make_no_advantage(correct):
    ungraded = dataclasses.replace(group([1.0, -1.0]), correct=correct)
    assert [float(s.advantages[0]) for s in with_advantages([ungraded])] == [0.0, 0.0]


def test_single_tokens_of_a_response_can_be_masked():
    tool = make_completion([10, 11, 12], trained=[True, False, True])
    groups = [Group(prompt=make_prompt(), completions=(tool, tool), correct=(True, False), rewards=(1, -1))]
    assert with_advantages(groups)[0].response_mask.tolist() == [False, False, True, False, True]
