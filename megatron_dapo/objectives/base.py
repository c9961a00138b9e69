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
from megatron_dapo.types import Group, Sample, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """What one micro-batch gives to a loss; [R] each.

    logprobs_R carries the gradient; entropy_R is detached. `streams` hold rollout_logprobs and what the
    objective `needs`. fresh_R: sampled by the weights that are trained now. samples_R: which of the
    micro-batch's `num_samples` samples a token belongs to. sample_group: the ranks that hold other tokens of
    the same samples (context parallelism); None when every sample is whole on this rank.
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
    unit (tokens that a mismatch correction masked). metrics: each with its own reduction; totals, weights and
    values may be tensors without dimensions, which are summed (or maximised) over micro-batches and ranks.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    excluded: torch.Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """needs: streams that must be there before the first update. samples: training samples of graded groups,
    in order. denominator: what the loss of these samples (one mini-batch, over all ranks) is divided by.
    loss: of a micro-batch.
    """

    needs: frozenset[Stream]
    samples: Callable[[Sequence[Group]], list[Sample]]
    denominator: Callable[[Sequence[Sample]], int]
    loss: Callable[[TokenInputs], LossTerms]


def trained_tokens(samples: Sequence[Sample]) -> int:
    """The denominator of a token mean: every response token that is trained on counts one."""
    return int(torch.cat([sample.response_mask for sample in samples]).sum())
