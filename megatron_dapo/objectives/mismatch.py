"""The gap between the engine that sampled and the policy that trains: how wide it is, and importance weights
that correct it.

Legend: T response tokens of one micro-batch. w = p_policy / p_engine = exp(old_logprobs - rollout_logprobs),
of a token or, as the product over its tokens or their geometric mean, of a whole response. Truncated w: Yao
et al. 2025; masked w: IcePop (arXiv 2510.18855) for tokens, Liu et al. 2025 for sequences; a mask by the
second moment of log w: M2PO (arXiv 2510.01161). Carried groups are covered too: their w holds the age of the
weights that sampled them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_dapo.objectives.base import LOG_LIMIT, SumOverRanks
from megatron_dapo.types import Batch, Stream


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
    level: Literal["token", "sequence", "geometric"],
    num_samples: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """w of every token, detached float64 [T]; with level 'sequence' (the product of w) and 'geometric' (its
    geometric mean) all tokens of a sample have the same.

    `samples_T` says which of the `num_samples` samples a token belongs to. `group`: ranks that hold other
    tokens of the same samples (context parallelism), collective for levels above 'token'; None when every
    sample is whole here.
    """
    log_T = old_logprobs_T.detach().double() - rollout_logprobs_T.double()
    if level != "token":
        sums_2N = log_T.new_zeros(2, num_samples)
        sums_2N.index_add_(1, samples_T, torch.stack([log_T, torch.ones_like(log_T)]))
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(sums_2N, group=group)
        log_N, count_N = sums_2N
        log_T = (log_N if level == "sequence" else log_N / count_N.clamp(min=1))[samples_T]
    return log_T.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def correct(
    weights_T: torch.Tensor,
    *,
    correction: Literal["auto", "none", "truncate", "mask", "second_moment"],
    low: float | None,
    high: float,
    kept_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token's term of the loss is multiplied with (fp32), and which tokens stay in it: [T] each.

    'truncate': min(w, high), all stay. 'mask': w where low <= w <= high, the others leave the loss and its
    denominator. 'second_moment': w where `kept_T` (Stream.KEPT, by `with_second_moment_mask`) is not 0.
    ('auto' has become another by then: ObjectiveSection.resolved.)
    """
    assert correction != "auto"
    stay_T = torch.ones_like(weights_T, dtype=torch.bool)
    if correction == "none":
        return torch.ones_like(weights_T, dtype=torch.float32), stay_T
    if correction == "truncate":
        return weights_T.clamp(max=high).float(), stay_T
    if correction == "second_moment":
        assert kept_T is not None, "the mask of the step is missing"
        stay_T = kept_T != 0
    else:
        stay_T = (weights_T >= (low or 0.0)) & (weights_T <= high)
    return weights_T.float(), stay_T


def with_second_moment_mask(batch: Batch, sum_over_ranks: SumOverRanks, limit: float) -> Batch:
    """The batch with Stream.KEPT: 0 for the trained tokens with the largest |log w| of the step, so many that
    the mean of (log w)^2 over the others is at most `limit` (M2PO). Collective.
    """
    old_T, rollout_T = (batch.streams[s].double() for s in (Stream.OLD_LOGPROBS, Stream.ROLLOUT_LOGPROBS))
    log_T = (old_T - rollout_T).abs().clamp(max=LOG_LIMIT)
    log_R = log_T[batch.response_mask_T]

    def moment(bound: float) -> float:
        kept_R = log_R[log_R <= bound]
        total, count = sum_over_ranks(torch.stack([kept_R.square().sum(), kept_R.new_tensor(len(kept_R))]))
        return float(total / count.clamp(min=1))

    low, high = limit**0.5, LOG_LIMIT  # with the first bound the mean is small enough in any case
    if moment(high) <= limit:
        return batch.with_stream(Stream.KEPT, torch.ones(len(log_T)))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if moment(middle) <= limit else (low, middle)
    return batch.with_stream(Stream.KEPT, (log_T <= low).float())


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
