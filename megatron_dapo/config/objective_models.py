"""Sections of the objectives that train beside, or against, another model: ppo and dpo."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from megatron_dapo.config.objective import KINDS
from megatron_dapo.config.objective_base import KIND, ClipFields, ObjectiveSection, PolicyLossSection


class PpoConfig(ClipFields, PolicyLossSection):
    kind: Literal["ppo"] = Field(default="ppo", description=KIND)
    advantage: Literal["whitened", "none"] = Field(
        default="whitened",
        description="Whiten the advantages over all trained tokens of the step, or leave them as they are.",
    )
    covariance: Literal["none"] = Field(
        default="none", description="Not with ppo: it draws its tokens before their advantages are known."
    )
    gae_lambda: float = Field(
        default=0.95, ge=0, le=1, description="Lambda of the advantages (GAE); there is no discount."
    )
    gae_length_alpha: float | None = Field(
        default=None,
        gt=0,
        description="Lambda = 1 - 1 / (alpha x tokens of the response) instead (VAPO, which has 0.05); null: "
        "gae_lambda.",
    )
    value_gae_lambda: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Lambda of the returns that the values are fitted to; at 1 they are the reward.",
    )
    value_lr: float = Field(
        default=1e-5, gt=0, description="Learning rate of the value model, constant after its warm-up."
    )
    value_warmup_updates: int = Field(
        default=0, ge=0, description="Linear warm-up of value_lr, in updates of the value model."
    )
    value_clip: float | None = Field(
        default=0.5,
        gt=0,
        description="A value that moves further than this from the old one has at least the error it has "
        "there; null: off.",
    )
    value_pretraining_steps: int = Field(
        default=0, ge=0, description="Steps in which the value model is trained alone, before all others."
    )


class DpoConfig(ObjectiveSection):
    kind: Literal["dpo"] = Field(default="dpo", description=KIND)
    mismatch_correction: Literal["auto", "none"] = Field(
        default="auto", description="None: the loss has no ratio to what was sampled."
    )
    beta: float = Field(
        default=0.1, gt=0, description="Weight of log p / p_ref in a pair's margin; larger: closer to p_ref."
    )

    def resolved(self, max_age: int) -> Self:
        return self


KINDS |= {"ppo": PpoConfig, "dpo": DpoConfig}
