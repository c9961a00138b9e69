"""GMPO (arXiv 2507.20673): the geometric instead of the arithmetic mean of a response's token ratios,
each clipped in the direction in which the advantage pushes it. A single extreme ratio weighs little.

    c = log r, at most log_eps_high where A > 0, at least -log_eps_low where A < 0
    term = exp(mean over the response's tokens of c) A

Every token has the response's value and, through its own c, the gradient of that value: with sequence_mean it
is the gradient of the paper's objective, also where a response's tokens are on several ranks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens, policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import GmpoConfig


def gmpo(config: GmpoConfig) -> Objective:
    """GMPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(geometric_mean, config))


def geometric_mean(config: GmpoConfig, tokens: Tokens) -> Surrogate:
    log_R, advantages_R = tokens.log_ratio_R, tokens.advantages_R
    low, high = -config.log_eps_low, config.log_eps_high
    cut_R = torch.where(advantages_R > 0, log_R.clamp(max=high), log_R.clamp(min=low))
    own_gradient_R = cut_R - cut_R.detach()  # 0
    ratio_R = (tokens.sample_means(cut_R.detach()) + own_gradient_R).exp()
    log_R = log_R.detach()
    shares = {
        "clip_low": (advantages_R < 0) & (log_R < low),
        "clip_high": (advantages_R > 0) & (log_R > high),
    }
    return Surrogate(terms_R=ratio_R * advantages_R, shares=shares)
