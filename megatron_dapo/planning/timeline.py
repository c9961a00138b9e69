"""The memory of a GPU in the order of a step: its phases, and within an update the positions of Megatron's
pipeline schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.activations import kept_by_position
from megatron_dapo.planning.memory import ENGINES, PHASES, MemoryPlan, Parts, most_micro_batches
from megatron_dapo.planning.step_time import StepTime

ACTIVATIONS = ("activations", "recomputed, gradients of activations", "log-probabilities")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Seconds from the beginning of the step, and the bytes on the fullest GPU of that phase."""

    phase: str
    start: float
    seconds: float
    parts: Parts


def timeline(memory: MemoryPlan, seconds: StepTime) -> tuple[Moment, ...]:
    """The phases of one step, one after the other. Engines fall asleep behind `generate`, and wake up behind
    `update`: half of StepTime.switch each, with what both sides have then.
    """
    moments, start = [], 0.0
    for phase in PHASES:
        took = getattr(seconds, phase) + (seconds.switch / 2 if phase in ("generate", "update") else 0.0)
        parts = memory.fullest(phase).parts[phase]
        moments.append(Moment(phase=phase, start=start, seconds=took, parts=parts))
        start += took
    return tuple(moments)


def one_update(config: RunConfig, model: ModelSpec, memory: MemoryPlan) -> dict[int, list[float]]:
    """By pipeline stage: bytes on its GPUs at each position of the schedule, a forward or a backward pass of
    one model chunk, when every sample fills a micro-batch. At most four times as many as there are stages.
    """
    found = {}
    for rank in memory.ranks:
        if rank.stage == ENGINES:
            continue
        others = {name: size for name, size in rank.parts["update"].items() if name not in ACTIVATIONS}
        found[rank.stage] = []
        for kept in kept_by_position(config, model, rank.stage, micro_batches=most_micro_batches(config)):
            found[rank.stage].append(sum(others.values()) + kept)
    return found
