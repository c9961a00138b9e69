"""Lite PPO (arXiv 2508.08221): the two tricks that its authors found to be enough for PPO's loss
without a value model: the group's mean with the batch's deviation, and a mean over tokens.

    A = (R - mean of the group) / std of the batch
    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import LitePpoConfig


def lite_ppo(config: LitePpoConfig) -> Objective:
    """Lite PPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
