"""What ppo makes of groups and values before the first update, and the loss of its value model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.cases import plan
from support.samples import make_group, make_prompt, make_sample

from megatron_dapo.config import PpoConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.ppo import value_terms, whitened
from megatron_dapo.types import Batch, Stream


def alone(own: torch.Tensor) -> torch.Tensor:
    """The sum over ranks where there is one."""
    return own


def config(**changed: Any) -> PpoConfig:
    return PpoConfig(**({"gae_lambda": 0.5, "advantage": "none", "mismatch_correction": "none"} | changed))


def part(**streams: list[float]) -> Batch:
    """Two responses, of two tokens with reward 1 and of one token with reward -1, behind one prompt token."""
    samples = [make_sample((3, 4, 5), 1, advantage=1.0), make_sample((6, 7), 1, advantage=-1.0)]
    batch = plan(samples, Layout(), num_updates=1, budget="all").part(0)
    for name, values in streams.items():
        batch = batch.with_stream(Stream(name), torch.tensor(values))
    return batch


VALUES = [9.0, 0.5, 0.25, 9.0, 0.75]  # what stands at prompt tokens is never read


def test_a_response_brings_its_reward_until_values_are_known():
    samples = make_objective(config()).samples([make_group(rewards=(0.5, -1.0), lengths=(2, 3))])
    assert [set(s.advantages.tolist()) for s in samples] == [{0.5}, {-1.0}]


def test_advantages_and_returns_by_hand():
    prepared = make_objective(config(value_gae_lambda=1.0)).prepare(part(values=VALUES), alone)
    # deltas: 0.25 - 0.5 and 1 - 0.25; -1 - 0.75
    assert prepared.advantages_T.tolist() == [0, -0.25 + 0.5 * 0.75, 0.75, 0, -1.75]
    assert prepared.streams[Stream.RETURNS].tolist() == [0, 1, 1, 0, -1]


def test_returns_have_a_lambda_of_their_own():
    prepared = make_objective(config(value_gae_lambda=0.0)).prepare(part(values=VALUES), alone)
    # r_t + V_{t+1}
    assert prepared.streams[Stream.RETURNS].tolist() == [0, 0.25, 1, 0, -1]


def test_lambda_may_depend_on_the_length():
    """alpha 1: lambda is 1 - 1/2 for the response of two tokens."""
    by_length = make_objective(config(gae_lambda=0.9, gae_length_alpha=1.0)).prepare(
        part(values=VALUES), alone
    )
    fixed = make_objective(config(gae_lambda=0.5)).prepare(part(values=VALUES), alone)
    assert by_length.advantages_T.tolist() == fixed.advantages_T.tolist()


def test_the_kl_is_taken_off_the_rewards_of_tokens():
    objective = make_objective(config(kl_coef=0.5, kl_in="reward", kl_estimator="k1", gae_lambda=1.0))
    assert objective.old_before_update and Stream.REFERENCE_LOGPROBS in objective.needs
    old, reference = [0, -1.0, -2.0, 0, -3.0], [0, -2.0, -1.0, 0, -3.0]  # differences 1, -1, 0
    batch = part(values=[0.0] * 5, old_logprobs=old, reference_logprobs=reference)
    # rewards -0.5, 1 + 0.5, -1; to go: 1, 1.5, -1
    assert objective.prepare(batch, alone).advantages_T.tolist() == [0, 1.0, 1.5, 0, -1]


def test_a_masked_response_has_neither_advantage_nor_return():
    samples = [
        make_sample((3, 4, 5), 1, advantage=5.0, response_mask=[False] * 3),
        make_sample((6, 7), 1, advantage=-1.0),
    ]
    batch = plan(samples, Layout(), num_updates=1, budget="all").part(0)
    batch = batch.with_stream(Stream.VALUES, torch.tensor([9.0, 9, 9, 9, 0.5]))
    prepared = make_objective(config()).prepare(batch, alone)
    assert prepared.advantages_T.tolist() == [0, 0, 0, 0, -1.5]


def test_whitening_takes_the_moments_of_all_ranks():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0, -3.0], dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-6)
    torch.testing.assert_close(whitened(values, alone), expected)
    parts = [values[:2], values[2:], values[:0]]
    # sums over ranks, as each rank would get them: first of (sum, count), then of squares
    first = torch.tensor([values.sum(), 5.0], dtype=torch.float64)
    squares = (values - values.mean()).square().sum()
    for own, wanted in zip(parts, (expected[:2], expected[2:], expected[:0]), strict=True):
        answers = iter([first, squares])
        torch.testing.assert_close(whitened(own, lambda _, answers=answers: next(answers)), wanted)


def test_value_loss_and_its_clip_by_hand():
    """Values 1, 1, 0 from old ones 0, 0, 0, with clip 0.5. Errors 1 (return 0), 4 at the near value 0.5 of
    return 2.5 (2.25 unclipped), 1 (return 1).
    """
    values = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    terms = value_terms(values, torch.zeros(3), torch.tensor([0.0, 2.5, 1.0]), clip=0.5)
    assert float(terms.loss.detach()) == pytest.approx(0.5 * (1 + 4 + 1))
    terms.loss.backward()
    assert values.grad.tolist() == [1.0, 0.0, -1.0]  # nothing where the clip decides
    assert float(terms.metrics["value_clip"].value) == pytest.approx(1 / 3)
    unclipped = value_terms(values, torch.zeros(3), torch.tensor([0.0, 2.5, 1.0]), clip=None)
    assert float(unclipped.loss.detach()) == pytest.approx(0.5 * (1 + 2.25 + 1))


def test_the_policys_loss_is_the_clipped_one():
    """With old log-probabilities as they are now the gradient of a token is its advantage, negative."""
    from megatron_dapo.objectives.base import TokenInputs

    objective = make_objective(config())
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    streams = {name: logprobs.detach() for name in objective.needs | {Stream.ROLLOUT_LOGPROBS}}
    inputs = TokenInputs(
        logprobs_R=logprobs,
        entropy_R=torch.zeros(2),
        advantages_R=torch.tensor([2.0, -3.0]),
        fresh_R=torch.ones(2, dtype=torch.bool),
        samples_R=torch.tensor([0, 1]),
        num_samples=2,
        streams=streams,
    )
    objective.loss(inputs).loss.backward()
    assert logprobs.grad.tolist() == [-2.0, 3.0]


def test_language_model_weights_are_there_for_correct_responses():
    group = make_group(make_prompt(), correct=1, lengths=(2, 2))
    samples = make_objective(config(lambda_lm=0.1)).samples([group])
    weights = [set(s.streams[Stream.LM_WEIGHTS].tolist()) for s in samples]
    assert weights == [{2.0}, {0.0}]  # half of the tokens are of correct responses


def test_covariances_need_advantages_that_are_known_beforehand():
    from megatron_dapo.config import RunConfig

    with pytest.raises(UserError, match="objective.covariance='clip'"):
        RunConfig.make({"model": {"path": "m"}, "objective": {"kind": "ppo", "covariance": "clip"}})


def test_streams_are_left_as_they_are_outside_the_trained_tokens():
    before = part(values=VALUES)
    prepared = make_objective(config()).prepare(before, alone)
    for field in dataclasses.fields(Batch):
        if field.name not in ("advantages_T", "streams"):
            assert getattr(prepared, field.name) is getattr(before, field.name)
