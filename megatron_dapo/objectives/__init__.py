"""Which objectives there are: `objective.kind` of the configuration -> a function from its section to an
Objective.

A new objective is a file beside this one, a row here, and a section of the same kind in config/objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_dapo.errors import UserError
from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.dapo import dapo

if TYPE_CHECKING:
    from megatron_dapo.config.objective import ObjectiveSection

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {"dapo": dapo}


def make_objective(section: ObjectiveSection, *, max_age: int = 0) -> Objective:
    """The objective that a configuration's `objective` section describes. `max_age`: sampling.max_age, which
    decides what mismatch_correction 'auto' is. UserError for a kind that is not registered.
    """
    if section.kind not in OBJECTIVES:
        raise UserError(
            f"objective.kind={section.kind} is not one of {', '.join(sorted(OBJECTIVES))}; use one of them "
            "or register it in megatron_dapo.objectives.OBJECTIVES"
        )
    return OBJECTIVES[section.kind](section.resolved(max_age))
