"""What a simulation counts: the tokens, and the seconds of its phases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dapo.batching.filtering import Window
from megatron_dapo.types import Group


@dataclass(slots=True)
class Ledger:
    """What became of every generated token. A finished group is pending until it is trained or can no
    longer be.

    unfinished: made by responses that still run when the simulation ends. wasted: tokens by reason:
    all_correct, all_wrong, outside_window (known before the step was full), surplus (behind the last
    trained group, and not kept), aborted and failed (requests that ended early), redrawn (the same prompt
    was sampled again).
    """

    window: Window
    dynamic: bool
    keeps_surplus: bool
    generated: int = 0
    trained: int = 0
    unfinished: int = 0
    is_over: bool = False
    wasted: Counter[str] = field(default_factory=Counter)
    pending: dict[int, tuple[int, float]] = field(default_factory=dict)  # position: tokens, accuracy
    of_step: int = 0  # generated since the step began

    def lost(self, position: int, tokens: int, reason: str) -> None:
        self.generated += tokens
        self.of_step += tokens
        if self.is_over:
            self.unfinished += tokens
        else:
            self.wasted[reason] += tokens

    def finished(self, group: Group) -> None:
        position, tokens = group.prompt.position, tokens_of(group)
        self.generated += tokens
        self.of_step += tokens
        if position in self.pending:
            self.wasted["redrawn"] += self.pending[position][0]
        self.pending[position] = tokens, group.accuracy

    def close_step(self, groups: Sequence[Group]) -> None:
        """These are trained; what lies before the last of them has been consumed, and without `keeps_surplus`
        nothing else is kept.
        """
        for group in groups:
            tokens, _ = self.pending.pop(group.prompt.position)
            self.trained += tokens
        last = max((group.prompt.position for group in groups), default=-1)
        for position, (tokens, accuracy) in list(self.pending.items()):
            verdict = self.window.judge(accuracy) if self.dynamic else "accepted"
            if position < last and verdict != "accepted":
                self.wasted[verdict] += tokens
            elif not self.keeps_surplus:
                self.wasted["surplus"] += tokens
            else:
                continue
            del self.pending[position]


@dataclass(slots=True)
class Timeline:
    """Phases of the run as (name, begin, end), in virtual seconds since the first step began."""

    phases: list[tuple[str, float, float]] = field(default_factory=list)
    levels: list[list[tuple[float, int]]] = field(default_factory=list)  # of each engine: (second, sequences)
    max_running: int = 1

    def mean(self, name: str, steps: int) -> float:
        return sum(end - begin for phase, begin, end in self.phases if phase == name) / steps


def tokens_of(group: Group) -> int:
    """Response tokens of all its completions."""
    return sum(len(completion.tokens) for completion in group.completions)
