"""The gap between the engine that sampled and the policy that trains: how wide it is, and importance weights
that correct it.

Legend: T response tokens of one micro-batch. w = p_policy / p_engine = exp(old_logprobs - rollout_logprobs),
of a token or, as the product over its tokens, of a whole response. Truncated w: Yao et al. 2025; masked w:
IcePop (arXiv 2510.18855) for tokens, Liu et al. 2025 for sequences. Carried groups are covered too: their w
holds the age of the weights that sampled them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

# |log w| beyond this is cut: the product over a long response overflows `exp`, and no bound reaches so far
LOG_LIMIT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchSums:
    """Sums over the response tokens of one micro-batch, masked ones included (`gap`, `gap_max`: over fresh
    tokens).
    """

    gap: torch.Tensor
    gap_max: torch.Tensor
    kl_k1: torch.Tensor
    kl_k3: torch.Tensor
    weights: torch.Tensor
    squares: torch.Tensor
    masked: torch.Tensor


def importance_weights(
    old_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    samples_T: torch.Tensor,
    *,
    level: Literal["token", "sequence"],
    num_samples: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """w of every token, detached float64 [T]; with level 'sequence' all tokens of a sample have the same.

    `samples_T` says which of the `num_samples` samples a token belongs to. `group`: ranks that hold other
    tokens of the same samples (context parallelism), collective for 'sequence'; None when every sample is
    whole here.
    """
    log_T = old_logprobs_T.detach().double() - rollout_logprobs_T.double()
    if level == "sequence":
        log_N = log_T.new_zeros(num_samples).index_add_(0, samples_T, log_T)
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(log_N, group=group)
        log_T = log_N[samples_T]
    return log_T.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def correct(
    weights_T: torch.Tensor,
    *,
    correction: Literal["auto", "none", "truncate", "mask"],
    low: float | None,
    high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token's term of the loss is multiplied with (fp32), and which tokens stay in it: [T] each.

    'truncate': min(w, high), all stay. 'mask': w where low <= w <= high, the others leave the loss and its
    denominator. ('auto' has become another by then: ObjectiveSection.resolved.)
    """
    assert correction != "auto"
    stay_T = torch.ones_like(weights_T, dtype=torch.bool)
    if correction == "none":
        return torch.ones_like(weights_T, dtype=torch.float32), stay_T
    if correction == "truncate":
        return weights_T.clamp(max=high).float(), stay_T
    stay_T = (weights_T >= (low or 0.0)) & (weights_T <= high)
    return weights_T.float(), stay_T


def mismatch_sums(
    old_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    fresh_T: torch.Tensor,
    weights_T: torch.Tensor,
    stay_T: torch.Tensor,
) -> MismatchSums:
    """What is reported of the gap. `kl_k1` and `kl_k3` estimate KL(engine || policy), nats a token, from its
    samples: -log w and w - 1 - log w of single tokens, whatever the level of the correction.
    """
    log_T = old_logprobs_T.detach().double() - rollout_logprobs_T.double()
    gap_T = torch.where(fresh_T, log_T.abs(), 0.0)
    cut_T = log_T.clamp(-LOG_LIMIT, LOG_LIMIT)
    return MismatchSums(
        gap=gap_T.sum(),
        gap_max=gap_T.max() if gap_T.numel() else gap_T.sum(),
        kl_k1=-log_T.sum(),
        kl_k3=(torch.expm1(cut_T) - cut_T).sum(),  # expm1: w - 1 would lose a gap of rounding
        weights=weights_T.sum(),
        squares=weights_T.square().sum(),
        masked=(~stay_T).sum(),
    )
