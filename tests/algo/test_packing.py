"""Properties of every packing, and one by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.algo.packing import pack, spread_bins
from megatron_dapo.types import Sample


def sample(prompt: int, response: int, *, trained: bool = True, version: int = 0, advantage: float = 0.0) -> Sample:
    length = prompt + response
    return Sample(
        tokens=tuple(range(length)),
        response_mask=(False,) * prompt + (trained,) * response,
        rollout_logprobs=(0.0,) * prompt + (-1.5,) * response,
        advantage=advantage,
        weight_version=version,
        prompt_position=0,
    )


SAMPLES = st.lists(
    st.builds(sample, st.integers(1, 20), st.integers(1, 100), trained=st.booleans(), version=st.integers(0, 1)),
    min_size=1,
    max_size=30,
)


@given(SAMPLES, st.integers(1, 4), st.integers(1, 4), st.integers(0, 200), st.integers(1, 5))
def test_every_packing(samples, dp, num_updates, slack, least):
    num_updates = min(num_updates, len(samples))
    budget = max(len(s.tokens) for s in samples) + slack
    batch = pack(samples, dp=dp, num_updates=num_updates, max_tokens=budget, min_micro_batches=least)
    assert len(batch.mini_batches) == num_updates
    done = 0
    for mini in batch.mini_batches:
        assert len(mini.micro_batches) == dp
        assert len({len(rank) for rank in mini.micro_batches}) == 1 and len(mini.micro_batches[0]) >= least
        for rank in mini.micro_batches:
            for micro in rank:
                assert sum(batch.lengths[i] for i in micro) <= budget
        inside = sorted(i for rank in mini.micro_batches for micro in rank for i in micro)
        assert inside == list(range(done, done + len(inside)))  # every sample once, in mini-batches as they came
        assert abs(len(inside) - len(samples) / num_updates) < 1
        assert mini.num_tokens == sum(sum(samples[i].response_mask) for i in inside)
        done += len(inside)
    assert done == len(samples)


@given(SAMPLES, st.integers(1, 4), st.integers(0, 50))
def test_mini_batches_depend_on_neither_layout_nor_budget(samples, dp, slack):
    def members(**how):
        batch = pack(samples, num_updates=min(2, len(samples)), **how)
        return [sorted(i for rank in mini.micro_batches for micro in rank for i in micro) for mini in batch.mini_batches]

    longest = max(len(s.tokens) for s in samples)
    assert members(dp=dp, max_tokens=longest + slack) == members(dp=1, max_tokens=10**6)


def test_by_hand():
    samples = [sample(1, n) for n in (3, 9, 5, 1, 7)]  # 4, 10, 6, 2, 8 tokens
    batch = pack(samples, dp=2, num_updates=1, max_tokens=12)
    # longest first to the emptier rank: 10 | 8, then 6 to the second (14), 4 to the first (14), 2 to the first (a tie)
    # bins of 12: [10, 2] [4] | [8] [6]
    assert batch.mini_batches[0].micro_batches == (((1, 3), (0,)), ((4,), (2,)))
    assert batch.mini_batches[0].num_tokens == 25
    assert batch.lengths == (4, 10, 6, 2, 8)


def test_streams_are_end_to_end():
    samples = [sample(2, 1, version=4, advantage=0.5), sample(1, 2, trained=False, version=3, advantage=-1.0)]
    batch = pack(samples, dp=1, num_updates=1, max_tokens=10)
    assert batch.tokens_T.tolist() == [0, 1, 2, 0, 1, 2] and batch.tokens_T.dtype == torch.int64
    assert batch.response_mask_T.tolist() == [False, False, True, False, False, False]
    assert batch.rollout_logprobs_T.tolist() == [0, 0, -1.5, 0, -1.5, -1.5]
    assert batch.advantages_N.tolist() == [0.5, -1.0]
    assert batch.fresh_N.tolist() == [True, False]


def test_a_pipeline_is_kept_filled_by_halving_the_fullest():
    assert spread_bins([[0, 1, 2, 3], [4]], 3) == [(0, 1), (4,), (2, 3)]
    assert spread_bins([[0], [1]], 4) == [(0,), (1,), (), ()]
    assert spread_bins([], 2) == [(), ()]


def test_a_sample_above_the_budget():
    with pytest.raises(ValueError, match=r"batch\.max_tokens=11 is below the longest sample \(12 tokens\); raise it or lower"):
        pack([sample(2, 10), sample(1, 1)], dp=1, num_updates=1, max_tokens=11)


def test_fewer_samples_than_updates():
    with pytest.raises(ValueError, match=r"batch\.updates_per_step=3 needs at least as many samples, got 2; lower it"):
        pack([sample(2, 1)] * 2, dp=1, num_updates=3, max_tokens=11)
