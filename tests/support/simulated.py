"""A simulated engine for the collector: outcomes are a function of (prompt, weight version), time is counted
in ticks of the event loop. And what sampling one prompt after another gives on the same outcomes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dapo.config import SamplingConfig
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.need import PassRate
from megatron_dapo.types import Collected, Group, Partial, Prompt
from support.collecting import MIXED, RIGHT, WRONG, G, Stream, check_conservation
from support.samples import make_group


@dataclass(frozen=True)
class Outcome:
    """correct: of G completions. ticks: how long it takes, which stands for its length."""

    correct: int
    ticks: int
    hard: bool = False

    @property
    def informative(self) -> bool:
        return 0 < self.correct < G


Outcomes = Callable[[int, int], Outcome]  # of (position, weight version)


def outcomes(
    seed: object, *, pass_rates: tuple[float, float], longer: float = 1.0, ticks: int = 8
) -> Outcomes:
    """Half the prompts are hard and pass at the second rate, half at the first. Durations are uniform with
    mean `ticks`; `longer` times as long are those of hard prompts, and again those of uninformative groups.
    """

    def outcome(position: int, version: int) -> Outcome:
        hard = random.Random(f"{seed}/{position}").random() < 0.5
        chance = random.Random(f"{seed}/{position}/{version}")
        informative = chance.random() < pass_rates[hard]
        correct = MIXED if informative else chance.choice([RIGHT, WRONG])
        scale = longer**hard * (1 if informative else longer)
        return Outcome(correct, ticks=1 + int(2 * ticks * scale * chance.random()), hard=hard)

    return outcome


@dataclass
class Engine:
    """Runs `concurrency` requests at once, the others wait in its queue. A request has the version that it
    began with, and a token for each tick so far.

    versions: what each prompt was sampled by, which may not change once it has tokens.
    """

    outcome: Outcomes
    concurrency: int = 1000
    version: int = 0
    running: dict[int, int] = field(default_factory=dict)  # position -> ticks
    versions: dict[int, int] = field(default_factory=dict)
    times_sampled: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.concurrency)
        self._open, self._grows = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._grows.set()

    async def __call__(self, prompt: Prompt, began: Sequence[Partial] = ()) -> Group:
        async with self._room:
            await self._open.wait()
            position, version = prompt.position, self.version
            self.running[position] = 0
            if began:
                [(version, self.running[position])] = began[0].versions
            else:
                self.times_sampled[position] += 1
            self.versions[position] = version
            outcome = self.outcome(position, version)
            try:
                while self.running[position] < outcome.ticks:
                    await asyncio.sleep(0)
                    await self._grows.wait()
                    self.running[position] += 1
            finally:
                del self.running[position]
            return make_group(prompt, outcome.correct, size=G, version=version)

    def beginnings(self) -> dict[int, tuple[Partial, ...]]:
        """Of all that run, by position: one response stands for all of a prompt."""
        return {
            position: (
                Partial(
                    tokens=np.zeros(ticks, np.int32),
                    logprobs=np.zeros(ticks, np.float32),
                    versions=((self.versions[position], ticks),),
                ),
            )
            for position, ticks in self.running.items()
        }

    def restarted(self) -> Engine:
        """Another process with the same weights; what has no token yet may be sampled by others."""
        engine = Engine(self.outcome, self.concurrency, self.version, versions=self.versions)
        engine.times_sampled = self.times_sampled - Counter(p for p, n in self.running.items() if n == 0)
        return engine

    async def push(self, version: int, *, keep: bool) -> None:
        """As Fleet.pause and a weight push: what runs ends, or stands still and goes on (`keep`); what waits
        begins with the new weights.
        """
        self._open.clear()
        if keep:
            self._grows.clear()
            for _ in range(3):
                await asyncio.sleep(0)
        while self.running and not keep:
            await asyncio.sleep(0)
        self.version = version
        self._open.set()
        self._grows.set()


class OldCollector(Collector):
    """What is behind the K-th accepted group is treated by its verdict and by whether it has finished, as it
    was until version 0.1: finished uninformative groups count as done, finished informative ones are kept
    (aged) or put back (strict), and running requests are aborted and put back.
    """

    def _close_step(self) -> Collected:
        kept = self._slots[: self._known]
        for slot in self._slots[self._known :]:
            if slot.result is not None and self._filter.verdict(slot.result) != "accepted":
                continue
            if slot.task is not None:
                slot.task.cancel()
                slot.task, slot.admitted = None, False
                self._requests.number -= 1
            kept.append(slot)
        self._slots = kept
        return super()._close_step()


@dataclass(kw_only=True)
class Simulation:
    """Steps of a collector on an engine, with a weight push after each, over which requests go on with
    `inflight_updates`. `believed` overrides the estimate of the pass rate, so that much more (or less) than
    needed runs ahead.

    kills: step -> ticks after which the process is stopped with a checkpoint, and resumed; if the step is
    over by then, it is stopped behind the push. stream: makes the prompts, anew for each resume. max_prompts:
    the cap; default one that is never reached, and with `max_prompts` a smaller batch is trained there.
    """

    outcome: Outcomes
    max_age: int = 0
    prompts_per_step: int = 4
    concurrency: int = 1000
    run_ahead: int | None = 0
    inflight_updates: bool = False
    one_round_at_a_time: bool = False
    believed: float | None = None
    train_ticks: int = 0
    kills: Mapping[int, int] = field(default_factory=dict)
    kind: type[Collector] = Collector
    stream: Callable[[], Any] = Stream
    max_prompts: int | None = None

    def run(self, steps: int) -> list[Collected]:
        return asyncio.run(self._run(steps))

    async def _run(self, steps: int) -> list[Collected]:
        self.engine, self._stream = Engine(self.outcome, self.concurrency), self.stream()
        collector = self._collector()
        collected = []
        for step in range(steps):
            if self.believed is not None:
                collector._pass_rate = PassRate(self.believed * 1e6, 1e6)
            kill_after = self.kills.get(step)
            task = asyncio.ensure_future(collector.collect(step))
            for _ in range(kill_after or 0):
                await asyncio.sleep(0)
            if kill_after is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})
                collector, kill_after = await self._resumed(collector), None
                task = asyncio.ensure_future(collector.collect(step))
            collected.append(await task)
            if self.kind is Collector:
                check_conservation(collected[-1])
            for _ in range(self.train_ticks):
                await asyncio.sleep(0)
            await self.engine.push(step + 1, keep=self.inflight_updates and self.max_age > 0)
            collector.weights_changed(step + 1)
            for _ in range(self.train_ticks // 2):
                await asyncio.sleep(0)
            if kill_after is not None:
                collector = await self._resumed(collector)
        await collector.stop()
        return collected

    async def _resumed(self, collector: Collector) -> Collector:
        """Another collector on another engine that goes on from this one's state."""
        beginnings = self.engine.beginnings() if collector.is_continuous else {}
        state, cursor, engine = collector.state(beginnings), self._stream.state(), self.engine.restarted()
        await collector.stop()
        self.engine, self._stream = engine, self.stream()
        self._stream.load_state(cursor)
        collector = self._collector()
        collector.load_state(state)
        return collector

    def _collector(self) -> Collector:
        config = SamplingConfig(
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=G,
            max_age=self.max_age,
            max_prompts=self.max_prompts or 100 * self.prompts_per_step + 100,
            on_cap="train_smaller_batch" if self.max_prompts else "error",
        )
        return self.kind(
            prompts=self._stream,
            sample=self.engine,
            config=config,
            one_round_at_a_time=self.one_round_at_a_time,
            run_ahead=self.run_ahead,
        )

    def sequential(self, steps: int) -> tuple[list[list[tuple[int, int]]], list[Counter[str]]]:
        """What `run` has to give: (position, version) of the batches, and the counts of what was passed over,
        as if one prompt were sampled after the other.

        Strict: by the version of the step. Aged: by the version that the engine really sampled each with,
        which must be one. (In rounds a step that was given up is sampled again.)
        """
        version_of = self.engine.versions
        if self.max_age and not self.one_round_at_a_time:
            assert set(self.engine.times_sampled.values()) == {1}, "a prompt was sampled twice"
        position, batches, counts = 0, [], []
        for step in range(steps):
            batch, passed = list[tuple[int, int]](), Counter[str]()
            while len(batch) < self.prompts_per_step:
                version = version_of[position] if self.max_age else step
                outcome = self.outcome(position, version)
                if outcome.informative:
                    batch.append((position, version))
                else:
                    passed["all_correct" if outcome.correct == RIGHT else "all_wrong"] += 1
                position += 1
            batches.append(batch)
            counts.append(passed)
        return batches, counts


def trained(collected: list[Collected]) -> list[list[tuple[int, int]]]:
    """(position, version) of each batch."""
    return [[(group.prompt.position, group.weight_version) for group in step.groups] for step in collected]
