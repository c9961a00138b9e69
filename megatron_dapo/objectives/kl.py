"""Distance from a frozen reference policy, of single tokens that the policy sampled (Schulman 2020,
"Approximating KL divergence"). With d = log p - log p_reference:

    k1 = d           unbiased; its gradient is zero on average, so it serves in the reward only
    k2 = d^2 / 2     its gradient is that of KL(policy || reference) on the policy's own samples
    k3 = exp(-d) - 1 + d     unbiased and never negative; its gradient is that of KL(reference || policy)

Legend: R response tokens of one micro-batch, T tokens of a data-parallel rank's part of the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from megatron_dapo.objectives.base import LOG_LIMIT
from megatron_dapo.types import Batch, Stream

Estimator = Literal["k1", "k2", "k3"]


def kl_of_tokens(logprobs_R: torch.Tensor, reference_R: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """The estimate for each token, nats; the gradient is that of `logprobs_R`. |d| is cut at 20."""
    log_R = (logprobs_R - reference_R).clamp(-LOG_LIMIT, LOG_LIMIT)
    if estimator == "k1":
        return log_R
    if estimator == "k2":
        return log_R.square() / 2
    return torch.expm1(-log_R) + log_R


def with_kl_in_reward(batch: Batch, coef: float) -> Batch:
    """The batch with -coef * k1 of each token added to its reward: every advantage gets the sum over this
    token and those behind it (arXiv 2501.03262). k1 is of the old policy. It has no baseline and is
    not normalised with the group.
    """
    old_T, reference_T = (batch.streams[s] for s in (Stream.OLD_LOGPROBS, Stream.REFERENCE_LOGPROBS))
    kl_T = kl_of_tokens(old_T.double(), reference_T.double(), "k1")
    kl_T = torch.where(batch.response_mask_T, kl_T, 0.0)
    to_go = [kl_L.flip(0).cumsum(0).flip(0) for kl_L in kl_T.split(batch.lengths)]
    shaped_T = batch.advantages_T - (coef * torch.cat(to_go)).float()
    return dataclasses.replace(batch, advantages_T=shaped_T)
