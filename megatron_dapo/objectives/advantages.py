"""Group-relative advantages: A_i = (R_i - mean(R)) / (std(R) + 1e-6), sample standard deviation (arXiv
2503.14476, eq. 9).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from megatron_dapo.types import Completion, Group, Prompt, Sample

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float], normalize: str = "std") -> list[float]:
    """Advantages of the G completions of a prompt; `normalize` is 'std' or 'none' (only minus the mean)."""
    mean = statistics.fmean(rewards)
    if normalize == "none":
        return [reward - mean for reward in rewards]
    if normalize != "std":
        raise ValueError(f"objective.advantage={normalize!r} must be 'std' or 'none'")
    scale = statistics.stdev(rewards, xbar=mean) + STD_EPS
    return [(reward - mean) / scale for reward in rewards]


def with_advantages(groups: Sequence[Group], *, normalize: str = "std") -> list[Sample]:
    """Training samples of the groups, in order. All tokens of a response have its advantage.

    A response that is masked (`Completion.trained`) still counts in its group's mean and deviation.
    """
    return [
        make_sample(group.prompt, completion, advantage)
        for group in groups
        for completion, advantage in zip(
            group.completions, group_advantages(group.rewards, normalize), strict=True
        )
    ]


def make_sample(prompt: Prompt, completion: Completion, advantage: float) -> Sample:
    """Prompt and response end to end. Prompt tokens are never trained on."""
    before, after = len(prompt.tokens), len(completion.tokens)
    return Sample(
        tokens=torch.cat([torch.tensor(prompt.tokens, dtype=torch.int32), torch.tensor(completion.tokens)]),
        response_mask=torch.cat([torch.zeros(before, dtype=torch.bool), torch.tensor(completion.trained)]),
        rollout_logprobs=torch.cat([torch.zeros(before), torch.tensor(completion.logprobs)]),
        advantages=torch.full((before + after,), advantage, dtype=torch.float32),
        prompt_position=prompt.position,
        number=completion.number,
        seed=completion.seed,
        weight_version=completion.weight_version,
    )
