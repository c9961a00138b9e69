"""The DAPO objective as sums over tokens (arXiv 2503.14476, eq. 8). The optimizer step owns the denominator.

Legend: T tokens of one micro-batch.
Three policies, three names: rollout_logprobs (engine), old_logprobs (policy at collection), logprobs (policy now).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over the trained tokens of one micro-batch; divide by the tokens of the whole mini-batch, once.

    `loss` carries the gradient; everything else is detached.
    """

    loss: torch.Tensor
    num_tokens: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
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
    """Sum over masked-in tokens of -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), bounded below by `dual_clip` * A for A < 0.

    `weights_T` (detached, algo/mismatch.py) multiplies each token's term; None is 1.

    Returns sums: the loss, the number of tokens, how many tokens each clip side held back, and the k3 estimate of
    KL(old || now). The ratio is masked before `exp`, so that whatever stands outside the mask cannot reach the result.
    """
    log_ratio_T = torch.where(mask_T, logprobs_T - old_logprobs_T, 0.0)
    ratio_T = log_ratio_T.exp()
    objective_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T)
    if dual_clip is not None:
        bounded_T = torch.maximum(objective_T, dual_clip * advantages_T)
        objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
    if weights_T is not None:
        objective_T = objective_T * weights_T
    with torch.no_grad():
        clip_low = (mask_T & (advantages_T < 0) & (ratio_T < 1 - eps_low)).sum()
        clip_high = (mask_T & (advantages_T > 0) & (ratio_T > 1 + eps_high)).sum()
        kl_old = (ratio_T - 1 - log_ratio_T).sum()  # k3; exactly 0 outside the mask
    return LossSums(
        loss=-torch.where(mask_T, objective_T, 0.0).sum(),
        num_tokens=mask_T.sum(),
        clip_low=clip_low,
        clip_high=clip_high,
        kl_old=kl_old,
    )
