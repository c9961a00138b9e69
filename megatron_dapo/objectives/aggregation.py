"""How the terms of single tokens become one loss: `objective.aggregation`.

    token_mean                sum over all tokens / tokens                           (arXiv 2503.14476, eq. 8)
    sequence_mean             mean over responses of the mean over their tokens      (arXiv 2402.03300)
    sequence_mean_token_sum   mean over responses of the sum over their tokens       (arXiv 2402.14740)
    constant                  the same, over a constant length of the response       (arXiv 2503.20783)

A loss returns the sum of its weighted terms; the optimizer step divides once by the denominator of the whole
mini-batch. Responses without a trained token count nowhere, nor does one whose tokens a mismatch correction
has masked all: a masked token is as if it were not there.

Legend: R response tokens of one micro-batch that this rank predicts, S samples of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from megatron_dapo.objectives.base import TokenInputs, trained_tokens
from megatron_dapo.types import Sample

Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_token_sum", "constant"]


def denominator_of(aggregation: Aggregation, constant_length: int) -> Callable[[Sequence[Sample]], int]:
    """`Objective.denominator`: trained tokens, responses, or responses times `constant_length` tokens."""
    if aggregation == "token_mean":
        return trained_tokens
    return partial(_responses, length=constant_length if aggregation == "constant" else 1)


def _responses(samples: Sequence[Sample], length: int) -> int:
    return length * sum(bool(sample.response_mask.any()) for sample in samples)


def aggregate(
    terms_R: torch.Tensor,
    stay_R: torch.Tensor,
    inputs: TokenInputs,
    *,
    aggregation: Aggregation,
    constant_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the terms of the tokens in `stay_R`, and what the others take off the denominator,
    in its unit. Collective over `inputs.sample_group`.
    """
    kept_R = torch.where(stay_R, terms_R, 0.0)
    if aggregation == "token_mean":
        return kept_R.sum(), (~stay_R).sum()
    staying_S = sample_sums(stay_R, inputs)
    if aggregation == "sequence_mean":
        kept_R = kept_R / staying_S.clamp(min=1)[inputs.samples_R].to(kept_R.dtype)
    masked_S = (sample_sums(torch.ones_like(stay_R), inputs) > 0) & (staying_S == 0)
    num_masked = masked_S.sum() if _counts_samples(inputs) else masked_S.sum() * 0
    return kept_R.sum(), num_masked * (constant_length if aggregation == "constant" else 1)


def sample_sums(values_R: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    """Sum over all tokens of each sample, wherever they are: detached float64 [S]. Collective over
    `inputs.sample_group`.
    """
    values_R = values_R.detach().double()
    sums_S = values_R.new_zeros(inputs.num_samples).index_add_(0, inputs.samples_R, values_R)
    if inputs.sample_group is not None and dist.get_world_size(inputs.sample_group) > 1:
        dist.all_reduce(sums_S, group=inputs.sample_group)
    return sums_S


def _counts_samples(inputs: TokenInputs) -> bool:
    """One of the ranks that share the samples counts them."""
    return inputs.sample_group is None or dist.get_rank(inputs.sample_group) == 0
