"""GSPO (arXiv 2507.18071, eq. 5 to 7, in its token form, eq. 13): one ratio for all of a response, the
geometric mean of its tokens', is clipped.

    s = exp(mean over the response's tokens of log p / p_old)
    term = min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)

Every token has the value s and, through its own log-probability, the gradient s A grad log p. With
sequence_mean that is the gradient of the response's clipped s A, also where its tokens are on several ranks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped_at
from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens, policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import GspoConfig


def gspo(config: GspoConfig) -> Objective:
    """GSPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(sequence_clipped, config))


def sequence_clipped(config: GspoConfig, tokens: Tokens) -> Surrogate:
    log_ratio_R = tokens.log_ratio_R
    own_gradient_R = log_ratio_R - log_ratio_R.detach()  # 0
    ratio_R = (tokens.sample_means(log_ratio_R.detach()) + own_gradient_R).exp()
    return clipped_at(config, ratio_R, tokens.advantages_R)
