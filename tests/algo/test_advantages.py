"""Advantages by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from megatron_dapo.algo.advantages import group_advantages, with_advantages
from megatron_dapo.types import Completion, Group, Prompt


def group(rewards: list[float], *, prompt: tuple[int, ...] = (5, 6), truncated: tuple[int, ...] = (), position: int = 3) -> Group:
    completions = tuple(
        Completion(
            tokens=tuple(range(10, 11 + i)),
            logprobs=tuple(-0.5 * (j + 1) for j in range(i + 1)),
            finish_reason="length" if i in truncated else "stop",
            weight_version=i,
        )
        for i in range(len(rewards))
    )
    return Group(
        prompt=Prompt(position=position, row=0, text="", answer="", tokens=prompt),
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
    assert group_advantages([1, 0, 2, -1]) == pytest.approx([0.5 / scale, -0.5 / scale, 1.5 / scale, -1.5 / scale], rel=1e-12)


def test_only_the_mean_is_subtracted_without_normalization():
    assert group_advantages([1, 0, 2, -1], "none") == [0.5, -0.5, 1.5, -1.5]


def test_equal_rewards_have_no_advantage():
    assert group_advantages([-1.0] * 5) == [0.0] * 5


def test_another_normalization_is_refused():
    with pytest.raises(ValueError, match=r"objective\.advantage='max' must be 'std' or 'none'"):
        group_advantages([1, 0], "max")


def test_samples_are_prompt_and_response_in_order():
    samples = with_advantages([group([1, -1]), group([2, 0, 1], prompt=(7,), position=4)], normalize="none")
    assert [s.tokens for s in samples] == [(5, 6, 10), (5, 6, 10, 11), (7, 10), (7, 10, 11), (7, 10, 11, 12)]
    assert [s.advantage for s in samples] == [1, -1, 1, -1, 0]
    assert samples[3].response_mask == (False, True, True)
    assert samples[3].rollout_logprobs == (0.0, -0.5, -1.0)
    assert [s.weight_version for s in samples] == [0, 1, 0, 1, 2]
    assert [s.prompt_position for s in samples] == [3, 3, 4, 4, 4]


def test_overlong_filtering_masks_truncated_responses_but_keeps_their_reward():
    rewards = [1.0, -1.0, -1.0]
    samples = with_advantages([group(rewards, truncated=(1,))], filter_overlong=True)
    assert [any(s.response_mask) for s in samples] == [True, False, True]
    assert samples[0].advantage == pytest.approx((1 + 1 / 3) / (statistics.stdev(rewards) + 1e-6))
    assert all(any(s.response_mask) for s in with_advantages([group(rewards, truncated=(1,))]))
