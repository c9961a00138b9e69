"""What an objective is: a value that says which samples to make of graded groups and which loss to take on
their tokens.

Losses return sums. The optimizer step divides once, by the denominator of the whole mini-batch.

Legend: R response tokens of one micro-batch that this rank predicts, S samples of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_dapo.metrics import Metric
from megatron_dapo.types import Batch, Group, Sample, Stream

# |log-ratio| beyond this is cut: `exp` of it would overflow, and its gradient with it
LOG_LIMIT = 20.0
# Adds a float64 tensor up over the data-parallel ranks, whose parts of the batch differ.
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """What one micro-batch gives to a loss; [R] each.

    logprobs_R carries the gradient, entropy_R too with `Objective.entropy_gradient`. `streams` hold
    rollout_logprobs and what the objective `needs`. fresh_R: sampled by the weights that are trained now.
    samples_R: which of the micro-batch's `num_samples` samples a token belongs to. sample_group: the ranks
    that hold other tokens of the same samples (context parallelism); None when every sample is whole on this
    rank.
    """

    logprobs_R: torch.Tensor
    entropy_R: torch.Tensor
    advantages_R: torch.Tensor
    fresh_R: torch.Tensor
    samples_R: torch.Tensor
    num_samples: int
    streams: Mapping[Stream, torch.Tensor]
    sample_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Sums over the tokens of one micro-batch on one rank. Only `loss` carries a gradient.

    num_tokens: tokens in the loss. excluded: what the loss left out of its denominator, in the denominator's
    unit (what a mismatch correction masked; objectives/aggregation.py). metrics: each with its own reduction;
    totals, weights and values may be tensors without dimensions, which are summed (or maximised) over micro-
    batches and ranks.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    excluded: torch.Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """needs: streams that must be there before the first update. samples: training samples of graded groups,
    in order. denominator: what the loss of these samples (one mini-batch, over all ranks) is divided by.
    loss: of a micro-batch. entropy_gradient: the loss takes a gradient of the entropy. prepare: called once
    per step with a data-parallel rank's part of the batch when its streams are there, and may change
    advantages and streams; collective, by its second argument. old_before_update: `prepare` reads the old
    log-probabilities, so they are computed beforehand in a step of one update, too.
    """

    needs: frozenset[Stream]
    samples: Callable[[Sequence[Group]], list[Sample]]
    denominator: Callable[[Sequence[Sample]], int]
    loss: Callable[[TokenInputs], LossTerms]
    entropy_gradient: bool = False
    prepare: Callable[[Batch, SumOverRanks], Batch] | None = None
    old_before_update: bool = False


def trained_tokens(samples: Sequence[Sample]) -> int:
    """The denominator of a token mean: every response token that is trained on counts one."""
    return int(torch.cat([sample.response_mask for sample in samples]).sum())
