"""MaxRL (arXiv 2602.02710): towards maximum likelihood of a correct answer, log(pass rate), instead of the
pass rate itself. The gradient of the log-likelihood is averaged over the correct responses alone, which the
group's mean turns into an advantage; hard prompts weigh up to 1 / pass rate.

    A = (correct - pass rate) / pass rate of the group, by the verifier alone
    term = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),  summed over the response's tokens

With one update a step r is 1 and the gradient the paper's, A grad log p. The clip is PPO's, for more updates.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.policy_gradient import policy_gradient

if TYPE_CHECKING:
    from megatron_dapo.config.objective import MaxrlConfig


def maxrl(config: MaxrlConfig) -> Objective:
    """MaxRL as the section `objective` of the configuration describes it."""
    return policy_gradient(config, partial(clipped, config))
