"""Section `sampling`: how many groups a step trains on, which are informative, how old they may be."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveInt

from megatron_dapo.config.sections import Section


class SamplingConfig(Section):
    prompts_per_step: PositiveInt = Field(
        default=512, description="K: a step trains on the first K informative groups of the stream."
    )
    samples_per_prompt: int = Field(default=16, ge=2, description="G: completions of each prompt.")
    dynamic: bool = Field(default=True, description="Dynamic sampling; false accepts every group.")
    metric: Literal["accuracy", "reward_std", "reward_mean"] = Field(
        default="accuracy",
        description="What makes a group informative: its accuracy by the verifier alone, or the deviation or "
        "the mean of its rewards, penalties included.",
    )
    low: float | None = Field(
        default=None,
        description="A group is informative if low < metric < high; null: 0, or no bound for reward_mean.",
    )
    high: float | None = Field(
        default=None, description="Upper end of that window; null: 1 for accuracy, else no bound."
    )
    inclusive: bool = Field(default=False, description="low <= metric <= high instead.")
    adaptive: bool = Field(
        default=False,
        description="Let the window move between low to high and (0, 1) exclusive, in steps of half the way: "
        "wider when too few groups are informative, and at the cap at once; narrower when enough are.",
    )
    adaptive_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of informative groups that an adaptive window is kept just above.",
    )
    max_prompts: PositiveInt | None = Field(
        default=None, description="Most prompts sampled in one step; default 10 x prompts_per_step."
    )
    on_cap: Literal["error", "train_smaller_batch"] = Field(
        default="error", description="What to do when max_prompts is reached."
    )
    max_age: int = Field(
        default=1,
        ge=0,
        description="0, strict: what lies behind the K-th informative group is sampled anew by the next "
        "policy. a >= 1, aged: it stays, and no prompt is launched to be trained on more than a steps later.",
    )

    @property
    def prompt_cap(self) -> int:
        return self.max_prompts or 10 * self.prompts_per_step

    @property
    def most_ahead(self) -> int:
        """Most prompts that are taken from the stream and that no step has consumed yet."""
        return (1 + self.max_age) * self.prompt_cap

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends of the window, infinite where there is none."""
        lowest = -math.inf if self.metric == "reward_mean" else 0.0
        highest = 1.0 if self.metric == "accuracy" else math.inf
        return (
            lowest if self.low is None else self.low,
            highest if self.high is None else self.high,
        )
