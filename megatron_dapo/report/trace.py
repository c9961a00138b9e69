"""trace.json: a run on one time axis, for ui.perfetto.dev or chrome://tracing (`report.trace=true`).

The trainer's steps with their phases, weight pushes, each engine's requests, grading; counters of running
sequences and of what waits. Lanes are threads: requests that overlap lie in different lanes of their engine.

The file is a JSON array without its closing bracket, which the format allows, so that what a killed run has
written loads as it is. Steps that a resumed run makes again are in it twice, each at its own time.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dapo.report.engines import Counters, Phases
from megatron_dapo.report.lines import unused_name

if TYPE_CHECKING:
    from megatron_dapo.types import GroupFacts

Event = dict[str, Any]
TRAINER, PUSHES, GRADING = "trainer", "weight pushes", "grading"  # processes; every other one is an engine
END = b"},\n"  # of an event
POINTS = 300  # of each counter, for a step
TAIL_BYTES = 1 << 16  # more than the longest event


class Trace:
    """The trace of a run; `step` appends what one step adds.

    Times are those of time.monotonic(), written as microseconds since 1970 so that a resumed run continues
    the axis.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        if path.exists() and not resumed:
            path.rename(unused_name(path))
        if path.exists():
            _cut_back(path)
        self._file = path.open("a", encoding="utf-8")
        if not self._file.tell():
            self._file.write("[\n")
        self._offset = time.time() - time.monotonic()
        self._pids: dict[str, int] = {}
        self._lanes: dict[str, list[tuple[float, int]]] = defaultdict(list)  # (busy until, lane), a heap

    def step(
        self, step: int, phases: Phases, sampled: Sequence[GroupFacts], counters: Sequence[Counters]
    ) -> None:
        """Append a step: its phases, the groups that finished in it, samples of the fleet since the last."""
        events = [*self._trainer(step, phases), *self._groups(sampled), *self._counters(counters)]
        self._file.writelines(json.dumps(event, separators=(",", ":")) + ",\n" for event in events)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _trainer(self, step: int, phases: Phases) -> Iterator[Event]:
        if not phases:
            return
        begin, end = min(p[1] for p in phases), max(p[2] for p in phases)
        yield from self._slice(TRAINER, 1, f"step {step}", begin, end)
        for name, begin, end in phases:
            yield from self._slice(TRAINER, 1, name, begin, end)
            if name == "sync":
                yield from self._slice(PUSHES, 1, f"version {step}", begin, end)

    def _groups(self, sampled: Sequence[GroupFacts]) -> Iterator[Event]:
        timed = [(facts, facts.timing) for facts in sampled if facts.timing]
        for facts, timing in sorted(timed, key=lambda pair: pair[1].sent):
            lane = self._lane(timing.engine, timing.sent, timing.answered)
            about = _about(facts)
            name = f"prompt {facts.position}"
            yield from self._slice(timing.engine, lane, name, timing.sent, timing.answered, about)
        for facts, timing in sorted(timed, key=lambda pair: pair[1].answered):
            lane = self._lane(GRADING, timing.answered, timing.graded)
            yield from self._slice(GRADING, lane, f"prompt {facts.position}", timing.answered, timing.graded)

    def _counters(self, counters: Sequence[Counters]) -> Iterator[Event]:
        for sample in counters[:: max(1, len(counters) // POINTS)]:
            for engine, running in sample.running.items():
                yield from self._count(engine, "running sequences", sample.when, running)
            yield from self._count(TRAINER, "waiting requests", sample.when, sample.waiting)

    def _lane(self, process: str, begin: float, end: float) -> int:
        """A lane that is free from `begin` on, taken until `end`."""
        lanes = self._lanes[process]
        if lanes and lanes[0][0] <= begin:
            _, lane = heapq.heappop(lanes)
        else:
            lane = len(lanes) + 1
        heapq.heappush(lanes, (end, lane))
        return lane

    def _slice(
        self, process: str, lane: int, name: str, begin: float, end: float, about: Event | None = None
    ) -> Iterator[Event]:
        yield from self._introduce(process)
        event = {"ph": "X", "pid": self._pids[process], "tid": lane, "name": name, "ts": self._time(begin)}
        event["dur"] = self._time(end) - event["ts"]
        yield event | ({"args": about} if about else {})

    def _count(self, process: str, name: str, when: float, value: int) -> Iterator[Event]:
        yield from self._introduce(process)
        event = {"ph": "C", "pid": self._pids[process], "tid": 0, "name": name, "ts": self._time(when)}
        yield event | {"args": {"value": value}}

    def _introduce(self, process: str) -> Iterator[Event]:
        """Name a process when it is first seen."""
        if process not in self._pids:
            pid = self._pids[process] = len(self._pids) + 1
            yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}

    def _time(self, seconds: float) -> int:
        return round((seconds + self._offset) * 1e6)


def _about(facts: GroupFacts) -> Event:
    return {
        "row": facts.row,
        "verdict": facts.verdict,
        "accuracy": None if math.isnan(facts.accuracy) else round(facts.accuracy, 4),
        "tokens": sum(facts.lengths),
        "longest": max(facts.lengths),
        "version": facts.weight_version,
    }


def _cut_back(path: Path) -> None:
    """Drop an event that a kill cut short."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(size - TAIL_BYTES, 0)
        file.seek(begin)
        tail = file.read()
        whole = tail.rfind(END)
        file.truncate(begin + whole + len(END) if whole >= 0 else begin)
