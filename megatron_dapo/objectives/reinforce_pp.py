"""REINFORCE++ with the group's mean as the baseline (arXiv 2501.03262): rewards minus the mean of their
group, whitened over all trained tokens of the batch instead of within the group.

    A = ((R - mean of the group) - mean) / std,  both over the batch's tokens
    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - kl_coef * (log p / p_ref)^2 / 2
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import ReinforcePpConfig


def reinforce_pp(config: ReinforcePpConfig) -> Objective:
    """REINFORCE++ as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
