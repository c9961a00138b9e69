"""A second kind of objective, all in one file: REINFORCE without ratios, divided by sequences or by a
constant.

Importing this file registers `objective.kind=reinforce`, as a package outside the project would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt

from megatron_dapo.config import ObjectiveSection, register_objective
from megatron_dapo.metrics import Count, Max, Mean
from megatron_dapo.objectives import OBJECTIVES
from megatron_dapo.objectives.advantages import with_advantages
from megatron_dapo.objectives.base import LossTerms, Objective, TokenInputs
from megatron_dapo.types import Sample


class ReinforceConfig(ObjectiveSection):
    kind: Literal["reinforce"] = "reinforce"
    divide_by: Literal["sequences", "constant"] = "sequences"
    constant: PositiveInt = 1000


def reinforce(config: ReinforceConfig) -> Objective:
    """loss = -sum over tokens of A log p, over the sequences of the mini-batch or over a constant."""

    def denominator(samples: Sequence[Sample]) -> int:
        return config.constant if config.divide_by == "constant" else len(samples)

    return Objective(needs=frozenset(), samples=with_advantages, denominator=denominator, loss=loss_terms)


def loss_terms(inputs: TokenInputs) -> LossTerms:
    assert "old_logprobs" not in inputs.streams  # nobody asked for them
    loss = -(inputs.advantages_R * inputs.logprobs_R).sum()
    surprise_R = -inputs.logprobs_R.detach()
    return LossTerms(
        loss=loss,
        num_tokens=torch.tensor(len(inputs.logprobs_R)),
        excluded=torch.tensor(0),
        metrics={
            "surprise": Mean(surprise_R.sum(), len(surprise_R)),
            "positive_tokens": Count((inputs.advantages_R > 0).sum()),
            "largest_surprise": Max(surprise_R.max() if len(surprise_R) else -torch.inf),
        },
    )


OBJECTIVES["reinforce"] = reinforce
register_objective(ReinforceConfig)
