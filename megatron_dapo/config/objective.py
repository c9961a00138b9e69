"""The objective section: `objective.kind` decides which other keys it has.

A new kind is a section class here (or anywhere, with `config.register_objective`) and an objective under
the same name in objectives/. Keys of another kind are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from megatron_dapo.config.sections import Section

DEFAULT_KIND = "dapo"


class ObjectiveSection(Section):
    """What every kind has. A subclass narrows `kind` to a Literal with its own name and adds its keys."""

    kind: str = Field(description="Which objective; decides which other keys this section has.")
    advantage: Literal["std", "none"] = Field(
        default="std", description="Divide by the group's sample standard deviation, or not."
    )
    mismatch_correction: Literal["auto", "none", "truncate", "mask"] = Field(
        default="auto",
        description="Weigh tokens by w = p_policy / p_engine: 'truncate' cuts w at mismatch_high, 'mask' "
        "leaves out what has w outside [mismatch_low, mismatch_high]; 'auto': 'truncate' with "
        "sampling.max_age >= 1, else 'none'.",
    )
    mismatch_level: Literal["token", "sequence"] = Field(
        default="token",
        description="w of each token, or one w for all of a response: the product over its tokens.",
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

    def resolved(self, max_age: int) -> Self:
        """The section with what 'auto' means for this sampling.max_age in its place."""
        if self.mismatch_correction != "auto":
            return self
        return self.model_copy(update={"mismatch_correction": "truncate" if max_age else "none"})


class DapoConfig(ObjectiveSection):
    kind: Literal["dapo"] = Field(
        default="dapo", description="Which objective; decides which other keys this section has."
    )
    eps_low: float = Field(
        default=0.2, gt=0, lt=1, description="The ratio is clipped from below at 1 - eps_low."
    )
    eps_high: float = Field(
        default=0.28, gt=0, description="The ratio is clipped from above at 1 + eps_high."
    )
    dual_clip: float | None = Field(
        default=10.0,
        gt=1,
        description="Upper bound c of the ratio where the advantage is negative; null: off.",
    )


# kind -> its section
KINDS: dict[str, type[ObjectiveSection]] = {"dapo": DapoConfig}


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
