"""Group-relative advantages: A_i = (R_i - mean(R)) / (std(R) + 1e-6), sample standard deviation (arXiv 2503.14476, eq. 9)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_dapo.types import Group, Sample

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float], normalize: str = "std") -> list[float]:
    """Advantages of the G completions of one prompt; `normalize` is 'std' or 'none' (subtract the mean only)."""
    mean = statistics.fmean(rewards)
    if normalize == "none":
        return [reward - mean for reward in rewards]
    if normalize != "std":
        raise ValueError(f"objective.advantage={normalize!r} must be 'std' or 'none'")
    scale = statistics.stdev(rewards, xbar=mean) + STD_EPS
    return [(reward - mean) / scale for reward in rewards]


def with_advantages(groups: Sequence[Group], *, normalize: str = "std", filter_overlong: bool = False) -> list[Sample]:
    """Training samples of the groups, in order.

    `filter_overlong` masks truncated responses out of the loss (they still count in the group's mean and deviation).
    """
    samples = []
    for group in groups:
        prompt = group.prompt.tokens
        for completion, advantage in zip(group.completions, group_advantages(group.rewards, normalize), strict=True):
            trained = not (filter_overlong and completion.truncated)
            samples.append(
                Sample(
                    tokens=prompt + completion.tokens,
                    response_mask=(False,) * len(prompt) + (trained,) * len(completion.tokens),
                    rollout_logprobs=(0.0,) * len(prompt) + completion.logprobs,
                    advantage=advantage,
                    weight_version=completion.weight_version,
                    prompt_position=group.prompt.position,
                )
            )
    return samples
