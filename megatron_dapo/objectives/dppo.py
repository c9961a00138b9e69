"""DPPO (arXiv 2602.04879): the trust region is a bound on the divergence from the policy that sampled, not on
the ratio, which is noise where probabilities are small.

    term = M min(r, ratio_max) A,  with the gradient M min(r, ratio_max) A grad log p

M is 0 for a token that diverges by more than delta and would be moved further away (A > 0 and p > q, or A < 0
and p < q), else 1. p is the probability of the token now, q the engine's. The divergence is that of a coin
which shows the token or another one: |p - q| ('tv'), or q log(q / p) + (1 - q) log((1 - q) / (1 - p)) ('kl').
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens, policy_gradient
from megatron_dapo.types import Stream

if TYPE_CHECKING:
    from megatron_dapo.config.objective import DppoConfig

TINY = 1e-8  # of the other tokens' probability, which rounds to 0


def dppo(config: DppoConfig) -> Objective:
    """DPPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(in_trust_region, config))


def in_trust_region(config: DppoConfig, tokens: Tokens) -> Surrogate:
    log_p_R, log_ratio_R = tokens.logprobs_R.detach(), tokens.log_ratio_R
    log_q_R = torch.where(tokens.stay_R, tokens.inputs.streams[Stream.ROLLOUT_LOGPROBS], 0.0)
    p_R, q_R = log_p_R.exp(), log_q_R.exp()
    if config.divergence == "tv":
        divergence_R = (p_R - q_R).abs()
    else:
        others_R = ((1 - q_R + TINY) / (1 - p_R + TINY)).log()
        divergence_R = q_R * (log_q_R - log_p_R) + (1 - q_R) * others_R
    away_R = torch.where(tokens.advantages_R > 0, p_R > q_R, p_R < q_R)
    outside_R = away_R & (divergence_R > config.delta)
    cut_R = log_ratio_R.detach().exp().clamp(max=config.ratio_max)
    ratio_R = cut_R * (log_ratio_R - log_ratio_R.detach()).exp()  # the gradient of a cut ratio goes on
    terms_R = torch.where(outside_R, 0.0, ratio_R * tokens.advantages_R)
    return Surrogate(terms_R=terms_R, shares={"outside": outside_R})
