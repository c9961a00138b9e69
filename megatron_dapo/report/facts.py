"""facts.jsonl: what each step did and when, for tools/simulate.py and for whoever asks why a step is slow.

One line a step: {step, began, phases: [[name, begin, end], ...], trained_tokens, prompt_tokens_trained,
groups: [{every field of GroupFacts, timing as [engine, sent, answered, graded] or null}, ...]}. Seconds of
one clock that never jumps; a resumed run may have another one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dapo.report.engines import Phases
    from megatron_dapo.types import Collected, GroupFacts


def step_facts(collected: Collected, *, began: float, phases: Phases, trained_tokens: int) -> dict[str, Any]:
    """The line of a step, without its number. trained_tokens: response tokens in the loss.
    prompt_tokens_trained counts a prompt once for each of its completions, as the policy reads it.
    """
    return {
        "began": began,
        "phases": [list(phase) for phase in phases],
        "trained_tokens": trained_tokens,
        "prompt_tokens_trained": sum(
            len(group.prompt.tokens) * len(group.completions) for group in collected.groups
        ),
        "groups": [_group(facts) for facts in collected.sampled],
    }


def _group(facts: GroupFacts) -> dict[str, Any]:
    timing = facts.timing
    return {field.name: getattr(facts, field.name) for field in fields(facts)} | {
        "timing": timing and [timing.engine, timing.sent, timing.answered, timing.graded]
    }
