"""The objective section: `objective.kind` decides which other keys it has and what their defaults are.

A new kind is a section class here (or anywhere, with `config.register_objective`) and an objective under
the same name in objectives/. Keys of another kind are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from megatron_dapo.config.objective_base import (
    KIND,
    Advantage,
    Aggregation,
    ClipFields,
    GroupSection,
    ObjectiveSection,
    RatioFields,
    advantage_field,
    aggregation_field,
    dual_clip_field,
    eps_high_field,
    eps_low_field,
    kl_coef_field,
    kl_estimator_field,
)

DEFAULT_KIND = "dapo"


class DapoConfig(ClipFields, GroupSection):
    kind: Literal["dapo"] = Field(default="dapo", description=KIND)
    eps_high: float = eps_high_field(0.28)
    dual_clip: float | None = dual_clip_field(10.0)


class GrpoConfig(ClipFields, GroupSection):
    kind: Literal["grpo"] = Field(default="grpo", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean")
    kl_coef: float = kl_coef_field(0.04)


class DrGrpoConfig(ClipFields, GroupSection):
    kind: Literal["dr_grpo"] = Field(default="dr_grpo", description=KIND)
    aggregation: Aggregation = aggregation_field("constant")
    advantage: Advantage = advantage_field("none")


class GspoConfig(ClipFields, GroupSection):
    kind: Literal["gspo"] = Field(default="gspo", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean")
    eps_low: float = eps_low_field(3e-4)
    eps_high: float = eps_high_field(4e-4)


class CispoConfig(RatioFields, GroupSection):
    kind: Literal["cispo"] = Field(default="cispo", description=KIND)
    eps_low: float = eps_low_field(1.0)
    eps_high: float = eps_high_field(4.0)


class SapoConfig(GroupSection):
    kind: Literal["sapo"] = Field(default="sapo", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean")
    tau_pos: float = Field(
        default=1.0, gt=0, description="How fast the gate closes as the ratio leaves 1, positive advantage."
    )
    tau_neg: float = Field(
        default=1.05, gt=0, description="The same where the advantage is negative; faster is more stable."
    )


class GmpoConfig(GroupSection):
    kind: Literal["gmpo"] = Field(default="gmpo", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean")
    log_eps_low: float = Field(
        default=0.4, gt=0, description="The log-ratio of a token is clipped from below at -log_eps_low."
    )
    log_eps_high: float = Field(
        default=0.4, gt=0, description="The log-ratio of a token is clipped from above at log_eps_high."
    )


class DppoConfig(GroupSection):
    kind: Literal["dppo"] = Field(default="dppo", description=KIND)
    divergence: Literal["tv", "kl"] = Field(
        default="tv",
        description="Divergence of the sampled token against all others: total variation or KL.",
    )
    delta: float = Field(
        default=0.15,
        gt=0,
        description="A token that would move further away and diverges by more has no gradient. The paper "
        "has 0.15 for tv and 0.05 for kl.",
    )
    ratio_max: float = Field(default=20.0, gt=1, description="The ratio is cut at this.")


class MaxrlConfig(ClipFields, GroupSection):
    kind: Literal["maxrl"] = Field(default="maxrl", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean_token_sum")
    advantage: Advantage = advantage_field("pass_rate")


class RlooConfig(ClipFields, GroupSection):
    kind: Literal["rloo"] = Field(default="rloo", description=KIND)
    aggregation: Aggregation = aggregation_field("sequence_mean_token_sum")
    advantage: Advantage = advantage_field("leave_one_out")


class ReinforcePpConfig(ClipFields, GroupSection):
    kind: Literal["reinforce_pp"] = Field(default="reinforce_pp", description=KIND)
    advantage: Advantage = advantage_field("batch_whitened")
    kl_estimator: Literal["k1", "k2", "k3"] = kl_estimator_field("k2")


class LitePpoConfig(ClipFields, GroupSection):
    kind: Literal["lite_ppo"] = Field(default="lite_ppo", description=KIND)
    advantage: Advantage = advantage_field("batch_std")


# kind -> its section
KINDS: dict[str, type[ObjectiveSection]] = {
    section.model_fields["kind"].default: section
    for section in (
        DapoConfig,
        GrpoConfig,
        DrGrpoConfig,
        GspoConfig,
        CispoConfig,
        SapoConfig,
        GmpoConfig,
        DppoConfig,
        MaxrlConfig,
        RlooConfig,
        ReinforcePpConfig,
        LitePpoConfig,
    )
}


def kind_of(value: Any) -> Any:
    """The kind that a section, or the dictionary of one, names; the default where it names none."""
    if isinstance(value, Mapping):
        return value.get("kind", DEFAULT_KIND)
    return getattr(value, "kind", None)


class _UnionOfKinds:
    """For pydantic: a section of the kind that it names, one of those in KINDS when the schema is built."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {kind: handler.generate_schema(section) for kind, section in KINDS.items()}
        return core_schema.tagged_union_schema(choices, discriminator=kind_of)


AnyObjective = Annotated[ObjectiveSection, _UnionOfKinds()]
