"""The DAPO objective as sums over tokens (arXiv 2503.14476, eq. 8). The optimizer step owns the denominator.

Legend: T or R tokens of one micro-batch. Three policies, three names: rollout_logprobs (engine), old_logprobs
(policy before the first update of the step), logprobs (policy now).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_dapo.metrics import EffectiveSize, Max, Mean
from megatron_dapo.objectives.advantages import with_advantages
from megatron_dapo.objectives.base import LossTerms, Objective, TokenInputs, trained_tokens
from megatron_dapo.objectives.mismatch import correct, importance_weights, mismatch_sums
from megatron_dapo.types import Stream

if TYPE_CHECKING:
    from megatron_dapo.config.objective import DapoConfig


def dapo(config: DapoConfig) -> Objective:
    """DAPO as the section `objective` of the configuration describes it."""
    return Objective(
        needs=frozenset({Stream.OLD_LOGPROBS}),
        samples=partial(with_advantages, normalize=config.advantage),
        denominator=trained_tokens,
        loss=partial(dapo_terms, config),
    )


def dapo_terms(config: DapoConfig, inputs: TokenInputs) -> LossTerms:
    """Loss and metrics of one micro-batch: the clipped objective, with the engine-policy mismatch corrected
    as configured.

    Metrics of tokens in the loss: clip_low, clip_high, clip_dual, kl_old. Of all trained tokens, masked ones
    included: entropy, fresh_tokens, masked (shares), kl_k1, kl_k3, ess. Of fresh tokens: gap, gap_max.
    """
    old_R, rollout_R = inputs.streams[Stream.OLD_LOGPROBS], inputs.streams[Stream.ROLLOUT_LOGPROBS]
    weights_R = importance_weights(
        old_R,
        rollout_R,
        inputs.samples_R,
        level=config.mismatch_level,
        num_samples=inputs.num_samples,
        group=inputs.sample_group,
    )
    factors_R, stay_R = correct(
        weights_R, correction=config.mismatch_correction, low=config.mismatch_low, high=config.mismatch_high
    )
    sums = dapo_loss(
        inputs.logprobs_R,
        old_R,
        inputs.advantages_R,
        stay_R,
        factors_R,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
        dual_clip=config.dual_clip,
    )
    gaps = mismatch_sums(old_R, rollout_R, inputs.fresh_R, weights_R, stay_R)
    fresh, num_tokens = inputs.fresh_R.sum(), len(inputs.logprobs_R)
    return LossTerms(
        loss=sums.loss,
        num_tokens=sums.num_tokens,
        excluded=gaps.masked,
        metrics={
            "clip_low": Mean(sums.clip_low, sums.num_tokens),
            "clip_high": Mean(sums.clip_high, sums.num_tokens),
            "clip_dual": Mean(sums.clip_dual, sums.num_tokens),
            "kl_old": Mean(sums.kl_old, sums.num_tokens),
            "entropy": Mean(inputs.entropy_R.sum(), num_tokens),
            "fresh_tokens": Mean(fresh, num_tokens),
            "kl_k1": Mean(gaps.kl_k1, num_tokens),
            "kl_k3": Mean(gaps.kl_k3, num_tokens),
            "masked": Mean(gaps.masked, num_tokens),
            "gap": Mean(gaps.gap, fresh),
            "gap_max": Max(gaps.gap_max),
            "ess": EffectiveSize(gaps.weights, gaps.squares, num_tokens),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over the trained tokens of one micro-batch; divide by the tokens of the whole mini-batch, once.

    `loss` carries the gradient; everything else is detached.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
    clip_dual: torch.Tensor
    kl_old: torch.Tensor


def dapo_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    weights_T: torch.Tensor | None = None,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
) -> LossSums:
    """Sum over masked-in tokens of -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), bounded below by
    `dual_clip` * A for A < 0.

    `weights_T` (detached, objectives/mismatch.py) multiplies each token's term; None is 1.

    Returns sums: the loss, the number of tokens, how many tokens each clip held back, and the k3
    estimate of KL(old || now). The ratio is masked before `exp`, so that whatever stands outside the mask
    cannot reach the result.
    """
    log_ratio_T = torch.where(mask_T, logprobs_T - old_logprobs_T, 0.0)
    ratio_T = log_ratio_T.exp()
    objective_T = torch.minimum(
        ratio_T * advantages_T, ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T
    )
    if dual_clip is not None:
        bounded_T = torch.maximum(objective_T, dual_clip * advantages_T)
        objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
    if weights_T is not None:
        objective_T = objective_T * weights_T
    with torch.no_grad():
        clip_low = (mask_T & (advantages_T < 0) & (ratio_T < 1 - eps_low)).sum()
        clip_high = (mask_T & (advantages_T > 0) & (ratio_T > 1 + eps_high)).sum()
        bound = math.inf if dual_clip is None else dual_clip
        clip_dual = (mask_T & (advantages_T < 0) & (ratio_T > bound)).sum()
        kl_old = (ratio_T - 1 - log_ratio_T).sum()  # k3; exactly 0 outside the mask
    return LossSums(
        loss=-torch.where(mask_T, objective_T, 0.0).sum(),
        num_tokens=mask_T.sum(),
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=clip_dual,
        kl_old=kl_old,
    )
