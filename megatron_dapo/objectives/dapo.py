"""DAPO (arXiv 2503.14476, eq. 8): the clipped ratio with more room above than below, a mean over all tokens
of the mini-batch, advantages A = (R - mean) / std of the group.

    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),  at least dual_clip * A where A < 0
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import DapoConfig


def dapo(config: DapoConfig) -> Objective:
    """DAPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
