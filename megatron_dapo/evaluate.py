"""Accuracy on held-out problems, by the same engines and verifier as training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_dapo.types import Group, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """avg@k: the mean over problems of the fraction of their k completions that is right, among those that
    were graded.
    """

    accuracy: float
    num_problems: int
    length_mean: float


def evaluate(prompts: Sequence[Prompt], submit: Callable[[Sequence[Prompt]], Sequence[Group]]) -> Evaluation:
    """Sample and grade every problem; `submit` returns their groups in order (RolloutService.submit)."""
    groups = submit(prompts)
    lengths = [len(completion.tokens) for group in groups for completion in group.completions]
    return Evaluation(
        accuracy=fmean([group.accuracy for group in groups if not math.isnan(group.accuracy)] or [0.0]),
        num_problems=len(groups),
        length_mean=sum(lengths) / len(lengths),
    )
