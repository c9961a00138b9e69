"""SAPO (arXiv 2511.20347): a soft gate instead of a clip. The gradient of a token fades as its
ratio leaves 1, with its full weight at 1.

    term = (4 / tau) sigmoid(tau (r - 1)) A,  tau = tau_pos where A > 0, else tau_neg
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.policy_gradient import Surrogate, Tokens, policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import SapoConfig


def sapo(config: SapoConfig) -> Objective:
    """SAPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(gated, config))


def gated(config: SapoConfig, tokens: Tokens) -> Surrogate:
    advantages_R = tokens.advantages_R
    tau_R = torch.full_like(advantages_R, config.tau_neg).masked_fill(advantages_R > 0, config.tau_pos)
    gate_R = (tau_R * (tokens.log_ratio_R.exp() - 1)).sigmoid() * 4 / tau_R
    return Surrogate(terms_R=gate_R * advantages_R)
