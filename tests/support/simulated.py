"""A simulated engine for the collector: outcomes are a function of (prompt, weight version), time is counted
in ticks of the event loop. And what sampling one prompt after another gives on the same outcomes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_dapo.config import SamplingConfig
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.need import PassRate
from megatron_dapo.types import Collected, Group, Prompt
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
    began with.
    """

    outcome: Outcomes
    concurrency: int = 1000
    version: int = 0
    running: int = 0
    began: list[tuple[int, int]] = field(default_factory=list)  # (position, version) in order

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.concurrency)
        self._open = asyncio.Event()
        self._open.set()

    async def __call__(self, prompt: Prompt) -> Group:
        async with self._room:
            await self._open.wait()
            version = self.version
            outcome = self.outcome(prompt.position, version)
            self.began.append((prompt.position, version))
            self.running += 1
            try:
                for _ in range(outcome.ticks):
                    await asyncio.sleep(0)
            finally:
                self.running -= 1
            return make_group(prompt, outcome.correct, size=G, version=version)

    async def push(self, version: int) -> None:
        """As Fleet.pause and a weight push: what runs ends, what waits goes on with the new weights."""
        self._open.clear()
        while self.running:
            await asyncio.sleep(0)
        self.version = version
        self._open.set()


class OldCollector(Collector):
    """What is behind the K-th accepted group is treated by its verdict and by whether it has finished, as it
    was until version 0.1: finished uninformative groups count as done, finished informative ones are kept
    (aged) or put back (strict), and running requests are aborted and put back.
    """

    def _close_step(self) -> Collected:
        kept = self._slots[: self._known]
        for slot in self._slots[self._known :]:
            if slot.group is not None and self._verdict(slot.group) != "accepted":
                continue
            if slot.task is not None:
                slot.task.cancel()
                slot.task, slot.admitted = None, False
                self._running -= 1
            kept.append(slot)
        self._slots = kept
        return super()._close_step()


@dataclass(kw_only=True)
class Simulation:
    """Steps of a collector on an engine, with a weight push after each. `believed` overrides the estimate of
    the pass rate, so that much more (or less) than needed runs ahead.
    """

    outcome: Outcomes
    max_age: int = 0
    prompts_per_step: int = 4
    concurrency: int = 1000
    run_ahead: int = 0
    one_round_at_a_time: bool = False
    believed: float | None = None
    train_ticks: int = 0
    kind: type[Collector] = Collector

    def run(self, steps: int) -> list[Collected]:
        return asyncio.run(self._run(steps))

    async def _run(self, steps: int) -> list[Collected]:
        self.engine = Engine(self.outcome, self.concurrency)
        config = SamplingConfig(
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=G,
            max_age=self.max_age,
            max_prompts=100 * self.prompts_per_step + 100,
        )
        collector = self.kind(
            prompts=Stream(),
            sample=self.engine,
            config=config,
            one_round_at_a_time=self.one_round_at_a_time,
            run_ahead=self.run_ahead,
        )
        collected = []
        for step in range(steps):
            if self.believed is not None:
                collector._pass_rate = PassRate(self.believed * 1e6, 1e6)
            collected.append(await collector.collect(step))
            if self.kind is Collector:
                check_conservation(collected[-1])
            for _ in range(self.train_ticks):
                await asyncio.sleep(0)
            await self.engine.push(step + 1)
        await collector.stop()
        return collected

    def sequential(self, steps: int) -> tuple[list[list[tuple[int, int]]], list[Counter[str]]]:
        """What `run` has to give: (position, version) of the batches, and the counts of what was passed over,
        as if one prompt were sampled after the other.

        Strict: by the version of the step. Aged: by the version that the engine really sampled each with,
        which must be one.
        """
        version_of = dict(self.engine.began)
        if self.max_age:
            assert len(version_of) == len(self.engine.began), "a prompt was sampled twice"
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
