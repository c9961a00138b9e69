"""Advantages by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from support.samples import make_completion, make_prompt

from megatron_dapo.errors import UserError
from megatron_dapo.objectives.advantages import group_advantages, with_advantages, with_lm_weights
from megatron_dapo.objectives.aggregation import denominator_of
from megatron_dapo.types import Group, Stream


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
    with pytest.raises(ValueError, match=r"objective\.advantage='max' is not a kind of advantage"):
        group_advantages([1, 0], "max")


def test_samples_are_prompt_and_response_in_order():
    samples = with_advantages([group([1, -1]), group([2, 0, 1], prompt=(7,), position=4)], advantage="none")
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


# --- other baselines and scales ------------------------------------------------------------


def values(groups: list[Group], advantage: str, **options) -> list[float]:
    return [float(s.advantages[0]) for s in with_advantages(groups, advantage=advantage, **options)]


def test_leaving_one_out_subtracts_the_mean_of_the_others():
    # the others' means of 1, 0, 2, -1: 1/3, 2/3, 0, 1
    assert group_advantages([1, 0, 2, -1], "leave_one_out") == pytest.approx([2 / 3, -2 / 3, 2.0, -2.0])


def test_the_pass_rate_scales_correctness_whatever_the_reward():
    hard = dataclasses.replace(group([0.3, -1.0, -0.2, -1.0]), correct=(True, False, False, False))
    assert values([hard], "pass_rate") == pytest.approx([3.0, -1.0, -1.0, -1.0])  # (1 - 1/4) / (1/4)
    unsolved = dataclasses.replace(group([0.3, -1.0]), correct=(False, False))
    assert values([unsolved], "pass_rate") == [0.0, 0.0]


def test_the_batch_deviation_is_of_all_graded_rewards():
    two = [group([1, -1]), dataclasses.replace(group([2, 0, 7], position=4), correct=(True, False, None))]
    scale = statistics.stdev([1, -1, 2, 0]) + 1e-6
    assert values(two, "batch_std") == pytest.approx([1 / scale, -1 / scale, 1 / scale, -1 / scale, 0.0])


def test_whitening_counts_every_trained_token_of_the_batch():
    """Lengths 1, 2 and 1, 2, 3 with the second response masked: tokens 1, 0 and 1, 2, 3."""
    two = [group([1, 0], masked=(1,)), group([3, 0, 0], position=4)]
    raw = [0.5, -0.5, 2.0, -1.0, -1.0]
    per_token = [0.5, 2.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    mean, scale = statistics.fmean(per_token), statistics.stdev(per_token) + 1e-6
    found = values(two, "batch_whitened")
    assert [found[i] for i in (0, 2, 3, 4)] == pytest.approx([(raw[i] - mean) / scale for i in (0, 2, 3, 4)])
    assert found[1] == 0.0  # no token of it is trained on


# --- several rewards -------------------------------------------------------------------------


def with_parts(parts: list[dict[str, float]], **options) -> Group:
    plain = group([sum(part.values()) for part in parts], **options)
    completions = tuple(
        dataclasses.replace(c, reward_parts=part) for c, part in zip(plain.completions, parts, strict=True)
    )
    return dataclasses.replace(plain, completions=completions)


def test_each_reward_is_normalised_before_the_sum():
    """A reward of large spread does not drown one of small spread; the sum is whitened over the responses."""
    answers, formats = [10.0, -10.0, -10.0], [0.0, 0.1, 0.0]
    one = with_parts([{"answer": a, "format": f} for a, f in zip(answers, formats, strict=True)])

    def z(rewards):
        return [(r - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6) for r in rewards]

    summed = [a + 0.5 * f for a, f in zip(z(answers), z(formats), strict=True)]
    expected = [(x - statistics.fmean(summed)) / (statistics.stdev(summed) + 1e-6) for x in summed]
    found = values([one], "std", each_reward=True, reward_weights={"format": 0.5})
    assert found == pytest.approx(expected, rel=1e-6)
    together = values([one], "std")
    assert found[1] - found[2] > 10 * (together[1] - together[2])  # the format counts


def test_rewards_that_differ_between_responses_are_refused():
    with pytest.raises(UserError, match="normalize_rewards=each needs the same rewards for every response"):
        values([with_parts([{"answer": 1.0}, {"format": 1.0}])], "std", each_reward=True)
    with pytest.raises(UserError, match="needs the same rewards for every response, found"):
        values([group([1, -1])], "std", each_reward=True)
    with pytest.raises(UserError, match="reward_weights names lenght; the rewards are answer"):
        parts = [{"answer": 1.0}, {"answer": 0.0}]
        values([with_parts(parts)], "std", each_reward=True, reward_weights={"lenght": 1.0})


# --- the language-model loss on correct responses --------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [
        ("token_mean", 9 / 5),
        ("sequence_mean", 5 / 3),
        ("sequence_mean_token_sum", 5 / 3),
        ("constant", 5 / 3),
    ],
)
def test_lm_weights_make_the_mean_one_of_the_correct_responses(aggregation, weight):
    """Tokens of responses 1, 2 | 1, 2, 3, of which the first, third and last are right."""
    two = [group([1, -1]), group([1, -1, 1], position=4)]
    samples = with_lm_weights(with_advantages(two), two, denominator_of(aggregation, 100))
    for sample, right in zip(samples, (True, False, True, False, True), strict=True):
        (found,) = set(sample.streams[Stream.LM_WEIGHTS].tolist())
        assert found == (pytest.approx(weight) if right else 0.0)


def test_without_a_correct_response_there_is_no_lm_loss():
    wrong = [group([-1, -1])]
    samples = with_lm_weights(with_advantages(wrong), wrong, denominator_of("token_mean", 1))
    assert all(not sample.streams[Stream.LM_WEIGHTS].any() for sample in samples)
