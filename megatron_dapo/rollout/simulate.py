"""A run without engines, GPUs or time: the real collector, fleet and sampler against simulated replicas.

    result = simulate(config, profile, difficulties, engines=32, steps=20, seed=0)

What is real: rollout/collect.py, fleet.py, router.py, replica.py and sample.py, driven as service.py does.
What is modelled: engines (simulate_engine.py), responses and verdicts (simulate_prompts.py), the update and
the push, which only take their seconds (simulate_model.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_dapo.batching.filtering import Window
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.sample import GroupSampler
from megatron_dapo.rollout.simulate_client import SimulatedClient, SimulatedServer
from megatron_dapo.rollout.simulate_clock import run_virtual
from megatron_dapo.rollout.simulate_engine import Engine, Meter
from megatron_dapo.rollout.simulate_model import Profile
from megatron_dapo.rollout.simulate_prompts import Difficulty, Stream, shares
from megatron_dapo.types import Collected, Completion, Group, Prompt

T = TypeVar("T")
BYTES_PER_TOKEN = 9  # of a completion: int32 token, float32 log-probability, one byte of mask
IDLE_CAUSES = {"rollout": "tail", "sync": "sync", "trainer": "trainer"}  # phase -> why an engine has no work


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
        position, tokens = group.prompt.position, _tokens(group)
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


class Simulation:
    """One simulated run. `await run()` inside a virtual loop, once; then `result()`."""

    def __init__(
        self,
        config: RunConfig,
        profile: Profile,
        difficulties: Sequence[Difficulty],
        *,
        engines: int,
        steps: int,
        seed: int,
        message: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.profile, self.steps = config, profile, steps
        self.meter = Meter()
        self.stream = Stream(
            difficulties,
            seed=seed,
            max_tokens=config.rollout.max_tokens,
            prompt_tokens=profile.prompt_tokens,
        )
        options = config.sampling
        self.ledger = Ledger(
            Window(low=options.low, high=options.high, inclusive=options.inclusive),
            options.dynamic,
            options.max_age > 0,
        )
        self.engines = [
            Engine(
                index,
                profile,
                max_running=config.rollout.max_concurrency,
                stalled_after_s=config.rollout.progress_timeout_s,
                meter=self.meter,
            )
            for index in range(engines)
        ]
        self.fleet = self._make_fleet(message)
        self.sampler = GroupSampler(
            generate=self.fleet.generate,
            grade=self._grade,
            run_seed=config.run.seed,
            seeded=config.rollout.seeded,
            options={"max_tokens": config.rollout.max_tokens, "stop_token_ids": ()},
        )
        self.collector = Collector(
            prompts=self.stream,
            sample=self._sample,
            config=config.sampling,
            one_round_at_a_time=config.rollout.seeded,
        )
        self.timeline = Timeline(max_running=config.rollout.max_concurrency)
        self.batches: list[list[int]] = []  # positions that each step trained on
        self.ages: Counter[int] = Counter()
        self._trained_by_row: Counter[int] = Counter()
        self._peak_bytes = self._peak_tokens = 0
        self._cpu_s = 0.0

    def _make_fleet(self, message: Callable[[str], None]) -> Fleet:
        replicas = [
            Replica(name=f"engine_{engine.index}", server=SimulatedServer(engine)) for engine in self.engines
        ]
        return Fleet(
            self.config.rollout,
            replicas,
            lambda server: SimulatedClient(
                server.engine, self.stream.outcome, self.ledger.lost, self.config.rollout.max_tokens
            ),
            message=message,
            clock=lambda: asyncio.get_running_loop().time(),
        )

    async def run(self) -> None:
        """Start the engines, push the first weights, then make the steps. The clock of the results begins
        with the first step.
        """
        await self.fleet.start()
        await self.fleet.wait_ready()
        await self._push(0)
        loop = asyncio.get_running_loop()
        self._zero = loop.time()
        self._phase("rollout")
        for engine in self.engines:
            engine.time_in.clear()
            engine.levels[:] = [(self._zero, 0)]
        for fault in self.profile.faults:
            if fault.engine >= len(self.engines):
                raise UserError(f"faults: engine={fault.engine}, there are {len(self.engines)} from 0 on")
            loop.call_later(fault.at_s, self.engines[fault.engine].strike, fault)
        memory, began, simulated = _resident_bytes(), time.process_time(), self.meter.seconds
        for version in range(self.steps):
            await self._step(version, memory)
        self._cpu_s = time.process_time() - began - (self.meter.seconds - simulated)
        self._end_phase()
        self.ledger.is_over = True
        for engine in self.engines:
            engine.set_phase("end")
            engine.levels.append((loop.time(), 0))
        self.timeline.levels = [[(at - self._zero, n) for at, n in e.levels] for e in self.engines]

    def result(self) -> dict[str, Any]:
        """The JSON object of tools/simulate.py, but `real_seconds`. docs/simulator.md says what each key
        means.
        """
        ledger, steps = self.ledger, self.steps
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for engine in self.engines:
            for key, value in engine.time_in.items():
                seconds[key] += value
        up = sum(s for (_, state), s in seconds.items() if state != "down")
        idle = {cause: seconds[phase, "idle"] / up for phase, cause in IDLE_CAUSES.items()}
        groups = sum(self._trained_by_row.values())
        rate_of = self.stream.difficulties
        rollout_s, sync_s, trainer_s = (
            self.timeline.mean(name, steps) for name in ("rollout", "sync", "trainer")
        )
        return {
            "step_seconds": rollout_s + sync_s + trainer_s,
            "rollout_seconds": rollout_s,
            "sync_seconds": sync_s,
            "trainer_seconds": trainer_s,
            "idle_share": sum(idle.values()),
            "idle_by_cause": idle,
            "engine_seconds_down": sum(s for (_, state), s in seconds.items() if state == "down"),
            "tokens": {
                "generated": ledger.generated,
                "trained": ledger.trained,
                "carried": sum(tokens for tokens, _ in ledger.pending.values()) + ledger.unfinished,
                "wasted_by_reason": dict(sorted(ledger.wasted.items())),
            },
            "trained": {
                "groups": groups,
                "mean_tokens": ledger.trained / max(groups * self.config.sampling.samples_per_prompt, 1),
                "share_by_pass_rate": shares(
                    (rate_of[row].pass_rate, n) for row, n in self._trained_by_row.items()
                ),
            },
            "sequential": self.stream.sequential(
                self.config.sampling, steps * self.config.sampling.prompts_per_step
            ),
            "age_histogram": {str(age): self.ages[age] for age in sorted(self.ages)},
            "preemptions": sum(engine.preemptions for engine in self.engines),
            "request_failures": dict(self.fleet.request_failures),
            "controller": {
                "cpu_seconds_per_step": self._cpu_s / steps,
                "us_per_token": 1e6 * self._cpu_s / max(ledger.generated, 1),
                "peak_bytes": self._peak_bytes,
                "token_bytes_left_out": BYTES_PER_TOKEN * self._peak_tokens,
            },
        }

    # --- one step, as trainer.py makes it

    async def _step(self, version: int, memory: int) -> None:
        collected = await self._collect(version)
        self._peak_bytes = max(self._peak_bytes, _resident_bytes() - memory)
        self._peak_tokens = max(self._peak_tokens, self.ledger.of_step)
        self.ledger.of_step = 0
        self._phase("trainer")
        self.ledger.close_step(collected.groups)
        self.batches.append([group.prompt.position for group in collected.groups])
        for group in collected.groups:
            self.ages[version - group.weight_version] += 1
            self._trained_by_row[group.prompt.row] += 1
        tokens = sum(_tokens(g) + len(g.completions) * self.profile.prompt_tokens for g in collected.groups)
        del collected
        await asyncio.sleep(tokens / self.profile.train_tokens_per_second)
        self._phase("sync")
        await self._push(version + 1)
        self._phase("rollout")

    async def _collect(self, version: int) -> Collected:
        """RolloutService.next_step: when no replica holds the weights that requests wait for, push them
        again.
        """
        self.fleet.expect(version)
        self.fleet.restart_dead()
        return await self._with_weights(self.collector.collect(version), version)

    async def _with_weights(self, work: Coroutine[Any, Any, T], version: int) -> T:
        task = asyncio.ensure_future(work)
        while True:
            needed = asyncio.ensure_future(self.fleet.router.weights_needed.wait())
            await asyncio.wait({task, needed}, return_when=asyncio.FIRST_COMPLETED)
            needed.cancel()
            if task.done():
                return task.result()
            self._phase("sync")
            await self._push(version)
            self._phase("rollout")

    async def _push(self, version: int) -> None:
        """As sync/publish.py does it: nothing in flight, the healthy replicas, the seconds of a push."""
        await self.fleet.pause()
        names = await self.fleet.push_targets()
        await asyncio.sleep(self.profile.sync_s)
        for name in names:
            self.fleet.set_ready(name, version)
        for engine, replica in zip(self.engines, self.fleet.replicas, strict=True):
            if replica.name in names and replica.client is not None:
                engine.set_phase(engine.phase)
                engine.holds_weights = True
        self.fleet.resume()

    async def _sample(self, prompt: Prompt) -> Group:
        n, temperature = self.config.sampling.samples_per_prompt, self.config.rollout.temperature
        group = await self.sampler.to_train(prompt, n=n, temperature=temperature)
        self.ledger.finished(group)
        return group

    async def _grade(self, prompt: Prompt, completions: list[Completion]) -> Group:
        """A simulated token is the verdict."""
        correct = tuple(bool(completion.tokens[0]) for completion in completions)
        rewards = tuple(1.0 if right else -1.0 for right in correct)
        return Group(prompt=prompt, completions=tuple(completions), correct=correct, rewards=rewards)

    # --- time

    def _phase(self, name: str) -> None:
        self._end_phase()
        for engine in self.engines:
            engine.set_phase(name)
        now = asyncio.get_running_loop().time() - self._zero
        self.timeline.phases.append((name, now, now))

    def _end_phase(self) -> None:
        if self.timeline.phases:
            name, begin, _ = self.timeline.phases[-1]
            self.timeline.phases[-1] = name, begin, asyncio.get_running_loop().time() - self._zero


def simulate(
    config: RunConfig,
    profile: Profile,
    difficulties: Sequence[Difficulty],
    *,
    engines: int,
    steps: int,
    seed: int,
    message: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Timeline]:
    """Simulate `steps` steps on `engines` engines; the JSON object of tools/simulate.py and what its
    picture shows.

    UserError as the run itself would raise it: too few engines live, the generation cap is reached.
    """
    began = time.monotonic()
    simulation = Simulation(
        config, profile, difficulties, engines=engines, steps=steps, seed=seed, message=message
    )
    run_virtual(simulation.run)
    result = simulation.result()
    return result | {"real_seconds": time.monotonic() - began}, simulation.timeline


def _tokens(group: Group) -> int:
    return sum(len(completion.tokens) for completion in group.completions)


def _resident_bytes() -> int:
    """Resident memory of this process now; where /proc is missing, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
