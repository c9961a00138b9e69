"""GRPO (arXiv 2402.03300, eq. 3): the clipped ratio, a mean over the tokens of each response and then over
the responses, a KL term against the reference in the loss, advantages A = (R - mean) / std of the group.

    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - kl_coef * (p_ref / p - 1 - log(p_ref / p))
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import GrpoConfig


def grpo(config: GrpoConfig) -> Objective:
    """GRPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
