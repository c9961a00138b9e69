"""What the engines did while a step went on, from samples of the fleet's state: idle time by cause, queue
lengths, and the line that the console shows.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# (name, begin, end) of the parts of a step, seconds of time.monotonic()
Phases = Sequence[tuple[str, float, float]]

UP = {"ready", "draining"}  # states of an engine that could generate; in the others it is down
# Why an engine is idle, by the phase of the step: collecting waits for the longest responses, the weights
# are pushed, or (any other phase) the policy computes.
CAUSES = {"rollout": "tail", "sync": "sync"}
OTHER_CAUSE = "trainer"
KINDS = ("idle_tail", "idle_sync", "idle_trainer", "down")


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet from `when` until the next sample: how many engines, how many of them idle and down; what
    waits.
    """

    when: float
    engines: int
    idle: int
    down: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Counters:
    """Sequences that run, by engine, and what waits: for the trace."""

    when: float
    running: Mapping[str, int]
    waiting: int


@dataclass(slots=True)
class EngineLog:
    """Samples of the fleet since `forget`. May be fed by one thread and read by another.

    keep_counters: whether `counters` is wanted, which takes memory for each engine of each sample.
    """

    keep_counters: bool = False
    _samples: list[Sample] = field(default_factory=list)
    _counters: list[Counters] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, when: float, states: Mapping[str, str], running: Mapping[str, int], waiting: int) -> None:
        """states: of every engine by its name; running: sequences by name, of engines that have any."""
        up = [name for name, state in states.items() if state in UP]
        idle = sum(not running.get(name) for name in up)
        sample = Sample(when, len(states), idle, len(states) - len(up), waiting)
        with self._lock:
            last = self._samples[-1] if self._samples else None
            if last is None or (last.engines, last.idle, last.down, last.waiting) != (
                sample.engines,
                sample.idle,
                sample.down,
                sample.waiting,
            ):
                self._samples.append(sample)
            if self.keep_counters:
                running = {name: running.get(name, 0) for name in states}
                self._counters.append(Counters(when, running, waiting))

    def metrics(self, phases: Phases) -> dict[str, float]:
        """Of the phases of a step: `engines/idle_*` and `engines/down` as shares of the engines' time,
        `engines/waiting_max`. NaN where no sample tells.
        """
        with self._lock:
            samples = list(self._samples)
        spent: dict[str, float] = defaultdict(float)
        waiting = [math.nan]
        for name, begin, end in phases:
            idle = f"idle_{CAUSES.get(name, OTHER_CAUSE)}"
            for sample, seconds in _within(samples, begin, end):
                spent["all"] += seconds * sample.engines
                spent[idle] += seconds * sample.idle
                spent["down"] += seconds * sample.down
                waiting.append(sample.waiting)
        shares = {kind: spent[kind] / spent["all"] if spent["all"] else math.nan for kind in KINDS}
        return {
            **{f"engines/{kind}": share for kind, share in shares.items()},
            "engines/waiting_max": max(waiting[1:], default=math.nan),
        }

    def counters(self) -> list[Counters]:
        with self._lock:
            return list(self._counters)

    def forget(self, until: float) -> None:
        """Drop what was before `until`, but the sample that holds at that time."""
        with self._lock:
            before = sum(sample.when <= until for sample in self._samples)
            del self._samples[: max(before - 1, 0)]
            self._counters = [counters for counters in self._counters if counters.when > until]


def _within(samples: Sequence[Sample], begin: float, end: float) -> list[tuple[Sample, float]]:
    """The samples that hold between two times, and for how many seconds of it."""
    ends = [*(sample.when for sample in samples[1:]), math.inf]
    held = (
        (sample, min(until, end) - max(sample.when, begin))
        for sample, until in zip(samples, ends, strict=False)  # without samples there is one end
    )
    return [(sample, seconds) for sample, seconds in held if seconds > 0]


def fleet_line(states: Mapping[str, str], running: Mapping[str, int], waiting: int) -> str:
    """`engines 31 ready, 1 starting | 4,812 running, 103 waiting`"""
    counts = Counter(states.values())
    named = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"engines {named or 'none'} | {sum(running.values()):,} running, {waiting:,} waiting"
