"""RLOO (arXiv 2402.14740): REINFORCE on whole responses with the mean reward of the other responses to
the prompt as the baseline.

    A = R - mean of the others' R
    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),  summed over the response's tokens

With one update a step r is 1 and the gradient the paper's, A grad log p. The clip is PPO's, for more updates.
The paper takes the KL off the reward: kl_coef with kl_in=reward and kl_estimator=k1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import RlooConfig


def rloo(config: RlooConfig) -> Objective:
    """RLOO as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
