"""Which streams a policy adds to a batch before the first update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import plan
from support.samples import make_samples

from megatron_dapo.layout import Layout
from megatron_dapo.metrics import Count, Mean
from megatron_dapo.objectives.advantages import with_advantages
from megatron_dapo.objectives.base import LossTerms, Objective, TokenInputs, trained_tokens
from megatron_dapo.policy.step import Policy, metrics_of
from megatron_dapo.types import Batch, Stream


def policy_that_needs(*needs: Stream, loss: Any = None) -> Policy:
    """Without a model: its log-probabilities are -3 everywhere."""
    policy = object.__new__(Policy)
    policy.objective = Objective(
        needs=frozenset(needs), samples=with_advantages, denominator=trained_tokens, loss=loss
    )
    policy.logprobs = lambda batch: torch.full((batch.tokens_T.numel(),), -3.0)  # type: ignore[method-assign]
    return policy


def batch(num_updates: int) -> Batch:
    return plan(make_samples(), Layout(), num_updates=num_updates, budget="half").part(0)


def test_old_logprobs_are_those_of_before_the_first_of_several_updates():
    streams = policy_that_needs(Stream.OLD_LOGPROBS).streams(batch(2)).streams
    assert streams.keys() == {Stream.ROLLOUT_LOGPROBS, Stream.OLD_LOGPROBS}
    assert set(streams[Stream.OLD_LOGPROBS].tolist()) == {-3.0}


def test_a_single_update_takes_its_own_log_probabilities_as_the_old_ones():
    """Computing them beforehand would be one pass over the batch for nothing."""
    before = batch(1)
    assert policy_that_needs(Stream.OLD_LOGPROBS).streams(before) is before


def test_an_objective_without_needs_gets_the_batch_as_it_is():
    before = batch(2)
    assert policy_that_needs().streams(before) is before


def test_streams_that_are_there_already_are_kept():
    before = batch(2).with_stream(Stream.OLD_LOGPROBS, torch.zeros(batch(2).tokens_T.numel()))
    assert policy_that_needs(Stream.OLD_LOGPROBS).streams(before) is before


def test_a_stream_of_another_model_must_have_been_added_by_it():
    with pytest.raises(AssertionError, match="reference_logprobs.*another model has to add"):
        policy_that_needs(Stream.REFERENCE_LOGPROBS).streams(batch(1))


def test_the_metrics_of_a_loss_are_learnt_without_a_batch():
    def loss(inputs: TokenInputs) -> LossTerms:
        gap = inputs.logprobs_R - inputs.streams[Stream.REFERENCE_LOGPROBS]
        none = torch.tensor(0)
        metrics = {"kl": Mean(gap.sum(), len(gap)), "calls": Count(1)}
        return LossTerms(loss=gap.sum(), num_tokens=none, excluded=none, metrics=metrics)

    objective = policy_that_needs(Stream.REFERENCE_LOGPROBS, loss=loss).objective
    assert {name: type(metric) for name, metric in metrics_of(objective).items()} == {
        "kl": Mean,
        "calls": Count,
    }
