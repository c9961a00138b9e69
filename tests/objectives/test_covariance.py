"""Which tokens are held back for their covariance."""

from __future__ import annotations

import statistics

import pytest
import torch
from support.samples import make_sample, make_samples

from megatron_dapo.objectives.covariance import with_high_covariance
from megatron_dapo.types import Stream

# two samples with one prompt token: covariance by hand below
LOGPROBS = [[0.0, -1.0, -4.0, -2.0], [0.0, -0.5, -3.0]]
ADVANTAGES = [2.0, -1.0]


def samples(**changed):
    return [
        make_sample([1] * len(row), 1, rollout_logprobs=row, advantage=advantage, **changed)
        for row, advantage in zip(LOGPROBS, ADVANTAGES, strict=True)
    ]


def flags(rule, share, low=1.0, high=5.0, of=None) -> list[list[float]]:
    found = with_high_covariance(of or samples(), rule=rule, share=share, low=low, high=high)
    return [sample.streams[Stream.HIGH_COVARIANCE].tolist() for sample in found]


def covariances() -> list[float]:
    tokens = [(lp, a) for row, a in zip(LOGPROBS, ADVANTAGES, strict=True) for lp in row[1:]]
    mean_lp, mean_a = statistics.fmean(lp for lp, _ in tokens), statistics.fmean(a for _, a in tokens)
    return [(lp - mean_lp) * (a - mean_a) for lp, a in tokens]


def test_kl_cov_takes_those_with_the_largest_covariance():
    # tokens -1 (A=2): 1.32, -4: -2.28, -2: 0.12 | -0.5 (A=-1): -2.88, -3: 1.62
    assert covariances() == pytest.approx([1.32, -2.28, 0.12, -2.88, 1.62])
    assert flags("kl", 0.2) == [[0, 0, 0, 0], [0, 0, 1]]
    assert flags("kl", 0.59) == [[0, 1, 0, 0], [0, 0, 1]]  # 2.95 tokens: two
    assert flags("kl", 1e-9) == [[0, 0, 0, 0], [0, 0, 1]]  # at least one


def test_clip_cov_draws_from_those_between_the_bounds():
    assert flags("clip", 1.0, low=1.0, high=1.5) == [[0, 1, 0, 0], [0, 0, 0]]
    assert flags("clip", 1.0, low=1.7) == [[0, 0, 0, 0], [0, 0, 0]]
    both = [flags("clip", 0.2), flags("clip", 0.2)]
    assert both[0] == both[1] and sum(map(sum, both[0])) == 1  # one of two, the same every time


def test_masked_tokens_have_no_part():
    masked = samples()[:1] + [
        make_sample([1] * 3, 1, rollout_logprobs=LOGPROBS[1], advantage=99.0, response_mask=[False] * 3)
    ]
    assert flags("kl", 1.0, of=masked) == [[0, 1, 1, 1], [0, 0, 0]]
    many = with_high_covariance(make_samples(), rule="kl", share=0.1, low=1.0, high=5.0)
    held = sum(int(sample.streams[Stream.HIGH_COVARIANCE].sum()) for sample in many)
    trained = sum(int(sample.response_mask.sum()) for sample in many)
    assert held == int(0.1 * trained)
    assert all(
        not (sample.streams[Stream.HIGH_COVARIANCE].bool() & ~sample.response_mask).any() for sample in many
    )


def test_a_step_without_a_trained_token_has_none():
    none = [make_sample([1, 2], 1, response_mask=[False, False])]
    for rule in ("kl", "clip"):
        (sample,) = with_high_covariance(none, rule=rule, share=0.5, low=1.0, high=5.0)
        assert torch.equal(sample.streams[Stream.HIGH_COVARIANCE], torch.zeros(2))
