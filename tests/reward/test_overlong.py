"""The overlong penalty and its strength, by hand."""

from __future__ import annotations

import dataclasses

import pytest
from support.samples import make_completion, make_group

from megatron_dapo.config import RewardConfig
from megatron_dapo.reward.overlong import LengthPenalty, overlong_penalty
from megatron_dapo.types import Group


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, 0.0),
        (16383, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),
        (30000, -1.0),
    ],
)
def test_flagship_penalty(num_tokens, expected):
    assert overlong_penalty(num_tokens, max_tokens=20480, cache=4096) == expected


@pytest.mark.parametrize("num_tokens", [0, 99, 100, 101])
def test_no_cache_is_no_penalty(num_tokens):
    assert overlong_penalty(num_tokens, max_tokens=100, cache=0) == 0.0


def test_cache_of_the_whole_length_starts_at_the_first_token():
    assert [overlong_penalty(n, max_tokens=4, cache=4) for n in range(6)] == [
        0.0,
        -0.25,
        -0.5,
        -0.75,
        -1.0,
        -1.0,
    ]


# --- how strong it is ---------------------------------------------------------------------


def step(truncated: int, of: int) -> list[Group]:
    """A step's groups of 4, so many of whose completions are truncated."""
    reasons = ["length"] * truncated + ["stop"] * (of - truncated)
    group = make_group(correct=1, size=4)
    return [
        dataclasses.replace(
            group, completions=tuple(make_completion(finish_reason=reason) for reason in reasons[i : i + 4])
        )
        for i in range(0, of, 4)
    ]


def test_the_factor_multiplies_the_penalty():
    penalty = LengthPenalty(RewardConfig(overlong_cache=4, overlong_factor=0.1), max_tokens=10)
    assert [penalty.of(n) for n in (6, 8, 10)] == [0.0, -0.05, -0.1]
    assert LengthPenalty(RewardConfig(overlong_cache=4), max_tokens=10).of(9) == -0.75


def test_the_factor_follows_the_truncated_share_within_its_bounds():
    """By hand: from 1 with a gain of 2 and a target of 0.25; at most 1.5."""
    options = {"overlong_target": 0.25, "overlong_gain": 2.0, "overlong_factor_max": 1.5}
    penalty = LengthPenalty(RewardConfig(overlong_cache=4, **options), max_tokens=10)
    seen = []
    for truncated in (2, 4, 6, 0, 0, 0, 8):
        penalty.end_step(step(truncated, of=8))
        seen.append(penalty.factor)
    assert seen == [1.0, 1.5, 1.5, 1.0, 0.5, 0.0, 1.5]
    penalty.end_step([])
    assert penalty.factor == 1.5 and penalty.of(10) == -1.5


def test_without_a_target_the_factor_stays():
    penalty = LengthPenalty(RewardConfig(overlong_cache=4, overlong_factor=0.3), max_tokens=10)
    penalty.end_step(step(8, of=8))
    assert penalty.factor == 0.3
    penalty.load_state(0.7)
    assert penalty.factor == 0.3, "the configuration's"


def test_a_resumed_factor_moves_on_exactly():
    reward = RewardConfig(overlong_cache=4, overlong_target=0.1, overlong_gain=0.37)
    whole = LengthPenalty(reward, max_tokens=10)
    for truncated in (3, 0, 1):
        whole.end_step(step(truncated, of=8))
    resumed = LengthPenalty(reward, max_tokens=10)
    resumed.load_state(whole.factor)
    for truncated in (2, 5, 0):
        whole.end_step(step(truncated, of=8))
        resumed.end_step(step(truncated, of=8))
        assert resumed.factor == whole.factor
