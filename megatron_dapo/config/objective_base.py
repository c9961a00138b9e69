"""What the sections of several objectives have in common; config/objective.py has one for each kind."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from megatron_dapo.config.sections import Section

KIND = "Which objective; decides which other keys this section has."
Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_token_sum", "constant"]
Advantage = Literal["std", "none", "leave_one_out", "pass_rate", "batch_std", "batch_whitened"]


# Fields whose default differs from kind to kind.
def aggregation_field(default: Aggregation) -> Any:
    return Field(
        default=default,
        description="Mean over all tokens; over responses of the mean over their tokens; over responses of "
        "the sum over their tokens; or the last over constant_length.",
    )


def advantage_field(default: Advantage) -> Any:
    return Field(
        default=default,
        description="Reward minus the group's mean, divided by the group's sample standard deviation, by "
        "nothing, by the batch's, or whitened over the batch's tokens; or minus the mean of the others; or "
        "correctness minus pass rate, over the pass rate.",
    )


def kl_coef_field(default: float) -> Any:
    return Field(
        default=default,
        ge=0,
        description="Strength of the KL term against the reference model; 0: no reference.",
    )


def kl_estimator_field(default: str) -> Any:
    return Field(
        default=default,
        description="Estimate of the KL: log(p/q), its square / 2, or q/p - 1 + log(p/q), q the reference. "
        "k1 in the reward only, which takes no other.",
    )


def eps_low_field(default: float) -> Any:
    return Field(
        default=default,
        gt=0,
        le=1,
        description="The ratio is clipped from below at 1 - eps_low; 1: never.",
    )


def eps_high_field(default: float) -> Any:
    return Field(
        default=default, gt=0, description="The ratio is clipped from above at 1 + eps_high; .inf: never."
    )


def dual_clip_field(default: float | None) -> Any:
    return Field(
        default=default,
        gt=1,
        description="Upper bound c of the ratio where the advantage is negative; null: off.",
    )


class ObjectiveSection(Section):
    """What every kind has. A subclass narrows `kind` to a Literal with its own name and adds its keys."""

    kind: str = Field(description=KIND)
    reference: str | None = Field(
        default=None,
        description="Folder or hub name of the frozen reference model, for objectives that have one; null: "
        "model.path, the weights that training starts from.",
    )
    mismatch_correction: Literal["auto", "none", "truncate", "mask", "second_moment"] = Field(
        default="auto",
        description="Weigh tokens by w = p_policy / p_engine: 'truncate' cuts w at mismatch_high, 'mask' "
        "leaves out what has w outside [mismatch_low, mismatch_high], 'second_moment' the tokens with the "
        "largest |log w| of the step until the mean of (log w)^2 is mismatch_moment; 'auto': 'truncate' with "
        "sampling.max_age >= 1, else 'none'.",
    )
    mismatch_level: Literal["token", "sequence", "geometric"] = Field(
        default="token",
        description="w of each token, or one w for all of a response: the product over its tokens, or its "
        "geometric mean.",
    )
    mismatch_low: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Least w that 'mask' keeps; null: no lower bound. Only for 'mask'.",
    )
    mismatch_high: float = Field(
        default=2.0, gt=1, le=1e6, description="Largest w that 'mask' keeps and 'truncate' leaves as it is."
    )
    mismatch_moment: float = Field(
        default=0.04,
        gt=0,
        description="Largest mean of (log w)^2 over the tokens that 'second_moment' keeps, nats^2.",
    )

    @model_validator(mode="after")
    def _mismatch_agrees(self) -> Self:
        if self.mismatch_correction == "second_moment" and self.mismatch_level != "token":
            raise ValueError(
                f"mismatch_level={self.mismatch_level} does not go with mismatch_correction=second_moment, "
                "which masks single tokens; use mismatch_level=token"
            )
        return self

    def resolved(self, max_age: int) -> Self:
        """The section with what 'auto' means for this sampling.max_age in its place."""
        if self.mismatch_correction != "auto":
            return self
        return self.model_copy(update={"mismatch_correction": "truncate" if max_age else "none"})


class PolicyLossSection(ObjectiveSection):
    """What every loss over sampled tokens has (objectives/policy_gradient.py)."""

    aggregation: Aggregation = aggregation_field("token_mean")
    constant_length: PositiveInt = Field(
        default=1024,
        description="Tokens that every response counts with aggregation=constant; usual: rollout.max_tokens.",
    )
    kl_coef: float = kl_coef_field(0.0)
    kl_estimator: Literal["k1", "k2", "k3"] = kl_estimator_field("k3")
    kl_in: Literal["loss", "reward"] = Field(
        default="loss",
        description="Add the KL term to the loss, or take it off the reward of each token: an advantage gets "
        "the sum over its token and those behind it.",
    )
    entropy_coef: float = Field(default=0.0, description="Strength of the entropy bonus; 0: none.")
    lambda_lm: float = Field(
        default=0.0,
        ge=0,
        description="Strength of the language-model loss (-log p) on correct responses; 0: none.",
    )
    covariance: Literal["none", "clip", "kl"] = Field(
        default="none",
        description="Hold back tokens whose log-probability and advantage covary most: 'clip' takes away "
        "their gradient, 'kl' adds a penalty on |log p - log p_old|.",
    )
    covariance_share: float = Field(
        default=2e-4, gt=0, le=1, description="Share of the step's trained tokens that is held back."
    )
    covariance_low: float = Field(
        default=1.0, description="Least covariance of a token that 'clip' may draw, nats."
    )
    covariance_high: float = Field(
        default=5.0, description="Largest covariance of a token that 'clip' may draw, nats."
    )
    covariance_kl_coef: float = Field(default=1.0, gt=0, description="Strength of the penalty of 'kl'.")

    @model_validator(mode="after")
    def _loss_agrees(self) -> Self:
        if self.kl_coef and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 in the loss has a gradient of zero on average; use k2 or k3, or kl_in=reward"
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator={self.kl_estimator} in the reward does not lead to the KL; use k1, or "
                "kl_in=loss"
            )
        if self.covariance_low >= self.covariance_high:
            raise ValueError(
                f"covariance_low={self.covariance_low} must be below covariance_high={self.covariance_high}; "
                "change either"
            )
        return self


class GroupSection(PolicyLossSection):
    """Objectives without a value model: the advantage comes from the rewards of a prompt's completions."""

    advantage: Advantage = advantage_field("std")
    normalize_rewards: Literal["sum", "each"] = Field(
        default="sum",
        description="Several rewards: one advantage of their sum, or of each its own, which are added and "
        "whitened over the batch (GDPO).",
    )
    reward_weights: dict[str, float] = Field(
        default={},
        description="With normalize_rewards=each: weight of each reward's advantage, by name; 1 without.",
    )

    @model_validator(mode="after")
    def _rewards_agree(self) -> Self:
        if self.normalize_rewards == "each" and self.advantage not in ("std", "none"):
            raise ValueError(
                f"advantage={self.advantage} does not go with normalize_rewards=each, which normalises every "
                "reward in its group; use advantage=std or none"
            )
        if self.reward_weights and self.normalize_rewards == "sum":
            raise ValueError(
                f"reward_weights={self.reward_weights} are for normalize_rewards=each; with sum the weights "
                "are those of the section reward"
            )
        return self


class RatioFields(Section):
    """Bounds of the ratio r = p / p_old."""

    eps_low: float = eps_low_field(0.2)
    eps_high: float = eps_high_field(0.2)


class ClipFields(RatioFields):
    """Bounds of PPO's objective (objectives/clipping.py)."""

    dual_clip: float | None = dual_clip_field(None)
