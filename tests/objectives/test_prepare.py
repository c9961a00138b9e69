"""What is done with whole samples, or with all tokens of the step, before the first update."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from support.cases import plan
from support.samples import make_sample, make_samples

from megatron_dapo.config.objective import DapoConfig, GrpoConfig
from megatron_dapo.layout import Layout
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.kl import kl_of_tokens, with_kl_in_reward
from megatron_dapo.objectives.mismatch import with_second_moment_mask
from megatron_dapo.types import Batch, Stream


def batch_of(rows: list[tuple[list[float], list[float]]], prompt: int = 1) -> Batch:
    """Samples of one prompt token and a response: (old - reference, rollout - old) of each token."""
    samples = [make_sample([1] * (prompt + len(k1)), prompt, advantage=1.0) for k1, _ in rows]
    batch = plan(samples, Layout(), num_updates=1, budget="all").part(0)
    old = torch.full((batch.tokens_T.numel(),), -1.0)
    pad = [9.0] * prompt  # never read
    k1_T = torch.tensor([x for k1, _ in rows for x in pad + k1])
    gap_T = torch.tensor([x for _, gap in rows for x in pad + gap])
    for stream, values_T in (
        (Stream.OLD_LOGPROBS, old),
        (Stream.REFERENCE_LOGPROBS, old - k1_T),
        (Stream.ROLLOUT_LOGPROBS, old + gap_T),
    ):
        batch = batch.with_stream(stream, values_T)
    return batch


def alone(own: torch.Tensor) -> torch.Tensor:
    return own


def test_the_kl_behind_a_token_is_taken_off_its_advantage():
    found = with_kl_in_reward(batch_of([([0.5, -0.25, 1.0], [0.0] * 3), ([2.0], [0.0])]), 0.1)
    expected = [1 - 0.125, 1 - 0.125, 1 - 0.075, 1 - 0.1, 1 - 0.2, 1 - 0.2]
    assert found.advantages_T.tolist() == pytest.approx(expected)


def test_the_estimators_by_hand():
    now, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # d = 0.5, -1
    for estimator, expected in {
        "k1": [0.5, -1.0],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 0.5, math.exp(1) - 2],
    }.items():
        assert kl_of_tokens(now, reference, estimator).tolist() == pytest.approx(expected)  # type: ignore[arg-type]


GAPS = [0.1, -0.5, 0.3, -0.05, 0.6, 0.2]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1.0, [1, 1, 1, 1, 1, 1]),
        (0.1, [1, 1, 1, 1, 0, 1]),  # without 0.36: 0.3925 / 5 = 0.0785
        (0.04, [1, 0, 1, 1, 0, 1]),  # without 0.25, too: 0.1425 / 4 = 0.036
        (0.03, [1, 0, 0, 1, 0, 1]),  # 0.0525 / 3
        (1e-4, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_second_moment_masks_the_largest_until_the_mean_is_small_enough(limit, kept):
    rows = [([0.0] * 4, GAPS[:4]), ([0.0] * 2, GAPS[4:])]
    found = with_second_moment_mask(batch_of(rows), alone, limit).streams[Stream.KEPT]
    assert found[batch_of(rows).response_mask_T].tolist() == kept


def test_the_mask_is_of_the_tokens_of_all_ranks():
    """Two parts whose sums are added up: the second has all the outliers, the first none."""
    parts = [batch_of([([0.0] * 3, [0.1, -0.05, 0.2])]), batch_of([([0.0] * 3, [-0.5, 0.3, 0.6])])]
    barrier, own, found = threading.Barrier(2), {}, {}

    def work(rank: int) -> None:
        def total(mine: torch.Tensor) -> torch.Tensor:
            own[rank] = mine
            barrier.wait()
            result = own[0] + own[1]
            barrier.wait()
            return result

        found[rank] = with_second_moment_mask(parts[rank], total, 0.04).streams[Stream.KEPT][1:].tolist()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [1, 1, 1], 1: [0, 1, 0]}


def test_masked_tokens_leave_loss_and_denominator():
    objective = make_objective(DapoConfig(mismatch_correction="second_moment"))
    assert objective.old_before_update and Stream.KEPT in objective.needs and objective.prepare
    prepared = objective.prepare(batch_of([([0.0] * 6, GAPS)]), alone)
    assert prepared.streams[Stream.KEPT][1:].tolist() == [1, 0, 1, 1, 0, 1]


def test_a_section_without_such_a_rule_prepares_nothing():
    for config in (DapoConfig(), GrpoConfig()):
        objective = make_objective(config)
        assert objective.prepare is None and not objective.old_before_update


def test_streams_of_samples_reach_the_batch():
    objective = make_objective(DapoConfig(covariance="kl", covariance_share=0.5))
    assert Stream.HIGH_COVARIANCE in objective.needs
    from megatron_dapo.objectives.covariance import with_high_covariance

    samples = with_high_covariance(make_samples(), rule="kl", share=0.5, low=1, high=5)
    batch = plan(samples, Layout(), num_updates=2, budget="half")
    expected = torch.cat([sample.streams[Stream.HIGH_COVARIANCE] for sample in samples])
    assert torch.equal(batch.streams[Stream.HIGH_COVARIANCE], expected)
