"""Which objectives there are: `objective.kind` of the configuration -> a function from its section to an
Objective.

A new objective is a file beside this one, a row here, and a section of the same kind in config/objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_dapo.errors import UserError
from megatron_dapo.objectives.base import Objective
from megatron_dapo.objectives.cispo import cispo
from megatron_dapo.objectives.dapo import dapo
from megatron_dapo.objectives.dpo import dpo
from megatron_dapo.objectives.dppo import dppo
from megatron_dapo.objectives.dr_grpo import dr_grpo
from megatron_dapo.objectives.gmpo import gmpo
from megatron_dapo.objectives.grpo import grpo
from megatron_dapo.objectives.gspo import gspo
from megatron_dapo.objectives.lite_ppo import lite_ppo
from megatron_dapo.objectives.maxrl import maxrl
from megatron_dapo.objectives.ppo import ppo
from megatron_dapo.objectives.reinforce_pp import reinforce_pp
from megatron_dapo.objectives.rloo import rloo
from megatron_dapo.objectives.sapo import sapo

if TYPE_CHECKING:
    from megatron_dapo.config.objective import ObjectiveSection

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "dapo": dapo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "dppo": dppo,
    "maxrl": maxrl,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "lite_ppo": lite_ppo,
    "ppo": ppo,
    "dpo": dpo,
}


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
