"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases. Every token weighs the same, whatever the length
of its response, because the sum over tokens is divided by a constant; and A = R - mean is not divided by the
group's deviation, which would favour prompts that are nearly always, or nearly never, solved.

    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import DrGrpoConfig


def dr_grpo(config: DrGrpoConfig) -> Objective:
    """Dr. GRPO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
