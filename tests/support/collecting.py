"""A scripted sampler for the collector: no server, and time is a list of who finishes when."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dapo.config import SamplingConfig
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.slots import Slot
from megatron_dapo.types import Collected, Group, GroupFacts, Partial, Prompt
from support.samples import make_group, make_prompt

G = 4
MIXED, RIGHT, WRONG = 2, G, 0


@dataclass
class Stream:
    """`length` prompts (endless without it), and how many of each prompt's completions are right."""

    correct: list[int] = field(default_factory=list)  # by position; MIXED beyond its end
    length: float = float("inf")
    position: int = 0
    recorded: list[tuple[int, float]] = field(default_factory=list)

    def next(self) -> Prompt | None:
        if self.position >= self.length:
            return None
        self.position += 1
        return make_prompt(self.position - 1)

    def record(self, prompt: Prompt, accuracy: float) -> None:
        self.recorded.append((prompt.position, accuracy))

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def correct_of(self, position: int) -> int:
        return self.correct[position] if position < len(self.correct) else MIXED


@dataclass
class Sampler:
    """Answers by script; `delays[position]` ticks of the event loop, `failures` are raised once each, `held`
    ones never finish.
    """

    stream: Stream
    version: int = 0
    delays: dict[int, int] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    began: dict[int, tuple[Partial, ...]] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: int = 0

    async def __call__(self, prompt: Prompt, began: Sequence[Partial] = ()) -> Group:
        position, version = prompt.position, self.version
        self.started.append(position)
        if began:
            self.began[position] = tuple(began)
        self.running += 1
        try:
            for _ in range(self.delays.get(position, 1)):
                await asyncio.sleep(0)
            if position in self.failures:
                raise self.failures.pop(position)
            if position in self.held:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(position)
            raise
        finally:
            self.running -= 1
        self.finished.append(position)
        return make_group(prompt, self.stream.correct_of(position), size=G, version=version)


def make(
    correct: Sequence[int] = (),
    *,
    length: float = float("inf"),
    one_round_at_a_time: bool = False,
    run_ahead: int | None = 0,
    **config,
) -> tuple[Collector, Sampler]:
    """Aged, it samples for no other step than the present one unless `run_ahead` says so."""
    stream = Stream(list(correct), length)
    sampler = Sampler(stream)
    options = {"prompts_per_step": 3, "samples_per_prompt": G, "max_age": 0} | config
    collector = Collector(
        prompts=stream,
        sample=sampler,
        config=SamplingConfig(**options),
        one_round_at_a_time=one_round_at_a_time,
        run_ahead=run_ahead,
    )
    return collector, sampler


async def collect(collector: Collector, sampler: Sampler, version: int = 0) -> Collected:
    """One step; a collector that hangs or spins fails the test. Strict, it may leave nothing running."""
    sampler.version = version
    async with asyncio.timeout(5):
        collected = await collector.collect(version)
    left = collected.counts.get("left_running", 0)
    assert sampler.running <= left and (left == 0 or collector.config.max_age > 0)
    check_conservation(collected)
    return collected


def check_conservation(collected: Collected) -> None:
    """Every group is counted by exactly one reason, and the counts are those of the groups."""
    counts = collected.counts
    assert counts.get("groups_accepted", 0) == len(collected.groups)
    assert counts.get("groups_sampled", 0) == len(collected.sampled)
    reasons = (
        "groups_accepted",
        "all_correct",
        "all_wrong",
        "outside_window",
        "carried_over",
        "surplus_dropped",
    )
    known = {"groups_sampled", "carried", "left_running", "aborted", "overdue", *reasons}
    assert counts.keys() <= known, f"count without a place in the balance: {counts.keys() - known}"
    came = counts.get("groups_sampled", 0) + counts.get("carried", 0)
    assert came == sum(counts.get(reason, 0) for reason in reasons), counts


def positions(groups: Iterable[Group | GroupFacts]) -> list[int]:
    return [group.prompt.position if isinstance(group, Group) else group.position for group in groups]


def informative_prefix(stream: Stream, start: int, number: int) -> list[int]:
    return list(itertools.islice((p for p in itertools.count(start) if 0 < stream.correct_of(p) < G), number))


def carried(state: dict[str, Any]) -> list[int]:
    """Positions of the finished groups in a collector's state."""
    return positions(slot.result for slot in state["slots"] if slot.result is not None)


def waiting(state: dict[str, Any]) -> list[int]:
    """Positions of the others."""
    return [slot.prompt.position for slot in state["slots"] if slot.result is None]


def state_of(
    waiting: Iterable[int] = (), carried: Iterable[int] = (), verdicts: tuple[float, float] = (9e5, 9e5)
) -> dict[str, Any]:
    """A collector's state: prompts that wait, and informative groups of version 0."""
    slots = [Slot(make_prompt(position)) for position in waiting]
    for position in carried:
        prompt = make_prompt(position)
        slots.append(Slot(prompt, admitted=True, result=make_group(prompt, MIXED, size=G), reported=True))
    slots = sorted(slots, key=lambda slot: slot.prompt.position)
    return {"slots": slots, "verdicts": verdicts, "window": 0}


def believe(collector: Collector, rate: float) -> None:
    """Make the collector sure of a pass rate, as after a million verdicts."""
    collector.load_state(collector.state() | {"verdicts": (rate * 1e6, 1e6)})
