"""Which objectives there are: `objective.kind` of the configuration -> a function from its section to an
Objective.

A new objective is a file beside this one, a row here, and a section of the same kind in config/objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dapo.errors import UserError
from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.dapo import dapo

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {"dapo": dapo}


def make_objective(section: Any) -> Objective:
    """The objective that a configuration's `objective` section describes. UserError for a kind that is not
    registered.
    """
    if section.kind not in OBJECTIVES:
        raise UserError(
            f"objective.kind={section.kind} is not one of {', '.join(sorted(OBJECTIVES))}; use one of them "
            "or register it in megatron_dapo.objectives.OBJECTIVES"
        )
    return OBJECTIVES[section.kind](section)
