"""PPO's clipped ratio (arXiv 1707.06347, eq. 7), with bounds of its own on either side (clip-higher, arXiv
2503.14476) and the dual clip (arXiv 1912.09729).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens

if TYPE_CHECKING:
    from megatron_dapo.config.objective_base import ClipFields


def clipped(config: ClipFields, tokens: Tokens) -> Surrogate:
    """min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) of each token, r = p / p_old."""
    return clipped_at(config, tokens.log_ratio_R.exp(), tokens.advantages_R)


def clipped_at(config: ClipFields, ratio_R: torch.Tensor, advantages_R: torch.Tensor) -> Surrogate:
    """The same for any ratio. Where A < 0 a term is at least `dual_clip` * A. Shares: tokens whose gradient
    each of the bounds takes away.
    """
    low, high = 1 - config.eps_low, 1 + config.eps_high
    terms_R = torch.minimum(ratio_R * advantages_R, ratio_R.clamp(low, high) * advantages_R)
    bound = math.inf if config.dual_clip is None else config.dual_clip
    if config.dual_clip is not None:
        terms_R = torch.where(
            advantages_R < 0, torch.maximum(terms_R, config.dual_clip * advantages_R), terms_R
        )
    ratio_R = ratio_R.detach()
    shares = {
        "clip_low": (advantages_R < 0) & (ratio_R < low),
        "clip_high": (advantages_R > 0) & (ratio_R > high),
        "clip_dual": (advantages_R < 0) & (ratio_R > bound),
    }
    return Surrogate(terms_R=terms_R, shares=shares)
