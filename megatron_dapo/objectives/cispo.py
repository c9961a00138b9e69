"""CISPO (arXiv 2506.13585, eq. 4 and 5): REINFORCE with the ratio, cut, as a weight without a gradient. No
token loses its gradient, however far its ratio moves.

    term = clip(r, 1 - eps_low, 1 + eps_high) A log p,  the gradient through log p alone

The paper has no bound below. The default above, a ratio of 5, is that of ScaleRL (arXiv 2510.13786).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens, policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import CispoConfig


def cispo(config: CispoConfig) -> Objective:
    """CISPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(cut_weight, config))


def cut_weight(config: CispoConfig, tokens: Tokens) -> Surrogate:
    low, high = 1 - config.eps_low, 1 + config.eps_high
    ratio_R = tokens.log_ratio_R.detach().exp()
    return Surrogate(
        terms_R=ratio_R.clamp(low, high) * tokens.advantages_R * tokens.logprobs_R,
        shares={"clip_low": ratio_R < low, "clip_high": ratio_R > high},
    )
