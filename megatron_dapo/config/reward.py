"""The reward section: who says whether a response is right, with what limits, and what else is rewarded."""

from __future__ import annotations

from pydantic import Field, FiniteFloat, PositiveInt

from megatron_dapo.config.sections import Section


class RewardConfig(Section):
    verifier: str = Field(
        default="dapo_boxed",
        description="Rule that decides whether a response is correct: dapo, dapo_boxed, math_verify, auto, "
        "exact, choice, code, 'package.module:function' or the URL of a service (docs/rewards.md). A row may "
        "name another (data.rule_key).",
    )
    rules: dict[str, FiniteFloat] = Field(
        default={},
        description="Further rules and their weights: weight x score of each is added to the verifier's "
        "score; they do not decide what is correct.",
    )
    workers: PositiveInt = Field(default=1, description="Grading processes.")
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="A grade that takes longer is killed and counted; its response is not trained on.",
    )
    memory_gib: float = Field(
        default=4.0,
        gt=0,
        description="Memory that grading may take in each process beyond its rules and its tokenizer, GiB.",
    )
    overlong_cache: int = Field(
        default=0,
        ge=0,
        description="L_cache: tokens before max_tokens over which the penalty grows to -1; 0: off.",
    )
    overlong_factor: float = Field(
        default=1.0,
        ge=0,
        description="What that penalty is multiplied with before it is added to the reward.",
    )
    overlong_target: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of truncated responses to come to: after each step the factor moves by "
        "overlong_gain x (truncated share - target). null: it stays.",
    )
    overlong_gain: float = Field(default=1.0, gt=0, description="How fast a factor with a target moves.")
    overlong_factor_max: float = Field(
        default=4.0, gt=0, description="Largest factor that it moves to; the smallest is 0."
    )
    overlong_filter: bool = Field(default=False, description="Mask truncated samples out of the loss.")
