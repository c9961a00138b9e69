"""A run without engines, GPUs or time: the real rollouts against simulated replicas.

    simulation = Simulation(config, profile, stream, engines=32, steps=20)
    result = simulation.simulate()      # the JSON object of tools/simulate.py

What is real: rollout/rollouts.py and all that it drives (collector, fleet, router, sampler), called in the
order in which the trainer calls it. What is modelled: engines (simulate_engine.py), responses and verdicts
(simulate_prompts.py, simulate_observed.py), the update and the push, which only take their seconds
(simulate_model.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.batching.filtering import Window
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.rollouts import Rollouts, WeightsNeeded
from megatron_dapo.rollout.simulate_client import PUSH_CHUNKS, SimulatedClient, SimulatedServer
from megatron_dapo.rollout.simulate_clock import Meter, run_virtual
from megatron_dapo.rollout.simulate_engine import Engine
from megatron_dapo.rollout.simulate_ledger import Ledger, Timeline, tokens_of
from megatron_dapo.rollout.simulate_model import Profile
from megatron_dapo.rollout.simulate_prompts import Stream, shares
from megatron_dapo.types import Collected, Completion, Group, Prompt, Timing

BYTES_PER_TOKEN = 8  # of a completion: int32 token, float32 log-probability
IDLE_CAUSES = {"rollout": "tail", "sync": "sync", "trainer": "trainer"}  # phase -> why an engine has no work
Trained = tuple[int, int, int, int]  # of a group: position, oldest weight version, tokens, right responses


class SimulatedGrading:
    """A simulated token is the verdict; a grade takes `seconds`. `made`: called with every group."""

    def __init__(self, seconds: float, made: Callable[[Group], None]) -> None:
        self._seconds, self._made = seconds, made

    async def grade(self, prompt: Prompt, completion: Completion) -> bool:
        if self._seconds:
            await asyncio.sleep(self._seconds)
        return bool(completion.tokens[0])

    def group(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        grades: Sequence[bool],
        timing: Timing | None = None,
    ) -> Group:
        group = Group(
            prompt=prompt,
            completions=tuple(completions),
            correct=tuple(grades),
            rewards=tuple(1.0 if right else -1.0 for right in grades),
            timing=timing,
        )
        self._made(group)
        return group


class Simulation:
    """One simulated run of `steps` steps on `engines` engines.

    timeline: what a picture shows. batches: what each step trained on. Both are whole after `simulate`.
    """

    def __init__(
        self,
        config: RunConfig,
        profile: Profile,
        stream: Stream,
        *,
        engines: int,
        steps: int,
        message: Callable[[str], None] = lambda line: None,
    ) -> None:
        for fault in profile.faults:
            if fault.engine >= engines:
                raise UserError(f"faults: engine={fault.engine}, there are {engines} from 0 on")
        self.config, self.profile, self.stream, self.steps = config, profile, stream, steps
        self.meter = Meter()
        options = config.sampling
        window = Window.of(options)
        self.ledger = Ledger(window, options.dynamic, options.max_age > 0)
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
        self.fleet = Fleet(
            config.rollout,
            [Replica(name=f"engine_{e.index}", server=SimulatedServer(e)) for e in self.engines],
            lambda server: SimulatedClient(
                server.engine, stream.outcome, self.ledger.lost, config.rollout.max_tokens
            ),
            message=message,
            clock=_now,
        )
        self.rollouts = Rollouts(
            config,
            fleet=self.fleet,
            prompts=stream,
            grading=SimulatedGrading(profile.grade_s, self.ledger.finished),
            clock=_now,
        )
        self.timeline = Timeline(max_running=config.rollout.max_concurrency)
        self.batches: list[list[Trained]] = []
        self.ages: Counter[int] = Counter()
        self._trained_by_row: Counter[int] = Counter()
        self._peak_bytes = self._peak_tokens = 0
        self._cpu_s = self._zero = 0.0
        self._states: dict[str, int] = {}

    def simulate(self) -> dict[str, Any]:
        """All steps on a virtual clock; docs/simulator.md says what each key means. Call it once.

        UserError as the run itself would raise it: too few engines live, the generation cap is reached.
        """
        began = time.monotonic()
        run_virtual(self._run)
        return self._result() | {"real_seconds": time.monotonic() - began}

    async def _run(self) -> None:
        """Start the engines, push the first weights, then make the steps. The clock of the results begins
        with the first step.
        """
        try:
            await self.rollouts.start()
            await self.rollouts.wait_ready()
            await self._push(0)
            await self._make_steps()
        finally:
            await self.rollouts.stop()

    async def _make_steps(self) -> None:
        loop = asyncio.get_running_loop()
        self._zero = loop.time()
        self._phase("rollout")
        for engine in self.engines:
            engine.time_in.clear()
            engine.levels[:] = [(self._zero, 0)]
        for fault in self.profile.faults:
            loop.call_later(fault.at_s, self.engines[fault.engine].strike, fault)
        memory, began, simulated = _resident_bytes(), time.process_time(), self.meter.seconds
        for version in range(self.steps):
            await self._step(version, memory)
        self._cpu_s = time.process_time() - began - (self.meter.seconds - simulated)
        self._end_phase()
        self._states = dict(Counter(str(replica.state) for replica in self.fleet.replicas))
        self.ledger.is_over = True
        for engine in self.engines:
            engine.set_phase("end")
            engine.levels.append((loop.time(), 0))
        self.timeline.levels = [[(at - self._zero, n) for at, n in e.levels] for e in self.engines]

    # --- one step, as trainer.py makes it

    async def _step(self, version: int, memory: int) -> None:
        collected = await self._collect(version)
        self._peak_bytes = max(self._peak_bytes, _resident_bytes() - memory)
        self._peak_tokens = max(self._peak_tokens, self.ledger.of_step)
        self.ledger.of_step = 0
        await asyncio.sleep(self.profile.rollout_s)
        self._phase("trainer")
        self.ledger.close_step(collected.groups)
        self.batches.append([_trained(group) for group in collected.groups])
        for group in collected.groups:
            self.ages[version - group.weight_version] += 1
            self._trained_by_row[group.prompt.row] += 1
        tokens = sum(
            tokens_of(group) + len(group.completions) * len(group.prompt.tokens) for group in collected.groups
        )
        del collected
        self._sleep(self.profile.colocated)
        await asyncio.sleep(self.profile.train_s + tokens / self.profile.train_tokens_per_second)
        self._sleep(False)
        self._phase("sync")
        await self._push(version + 1)
        self._phase("rollout")

    async def _collect(self, version: int) -> Collected:
        while True:
            try:
                return await self.rollouts.next_step(version)
            except WeightsNeeded:  # all engines that live were restarted
                self._phase("sync")
                await self._push(version)
                self._phase("rollout")

    async def _push(self, version: int) -> None:
        """The calls of sync/publish.py in its order: a replica that fails gets nothing more of this push."""
        await self.rollouts.pause()
        names = await self.fleet.push_targets()
        names = await self._on_all(names, "begin", lambda _, client: client.start_weight_update())
        for _ in range(PUSH_CHUNKS):
            names = await self._on_all(names, "send", lambda _, client: client.update_weights([]))

        finished = await self._on_all(
            names, "commit", lambda _, client: client.finish_weight_update(str(version))
        )
        for name in finished:
            self.fleet.set_ready(name, version)
        await self.rollouts.resume()

    async def _on_all(
        self, names: list[str], phase: str, what: Callable[[str, Any], Awaitable[None]]
    ) -> list[str]:
        """Make a call on these replicas; the names of those that answered."""
        errors = await self.fleet.call(names, what)
        for name, error in errors.items():
            if error is not None:
                self.fleet.set_failed(name, f"weights were pushed ({phase})", error)
        return [name for name in names if errors[name] is None]

    def _sleep(self, asleep: bool) -> None:
        for engine in self.engines:
            if engine.is_asleep != asleep:
                engine.hold(asleep=asleep)

    # --- time and figures

    def _phase(self, name: str) -> None:
        self._end_phase()
        for engine in self.engines:
            engine.set_phase(name)
        now = _now() - self._zero
        self.timeline.phases.append((name, now, now))

    def _end_phase(self) -> None:
        if self.timeline.phases:
            name, begin, _ = self.timeline.phases[-1]
            self.timeline.phases[-1] = name, begin, _now() - self._zero

    def _result(self) -> dict[str, Any]:
        ledger, steps = self.ledger, self.steps
        groups = sum(self._trained_by_row.values())
        rates = self.stream.pass_rates
        by_rate = shares((rates[row], n) for row, n in self._trained_by_row.items())
        options = self.config.sampling
        return {
            **self._times(),
            "tokens": {
                "generated": ledger.generated,
                "trained": ledger.trained,
                "carried": sum(tokens for tokens, _ in ledger.pending.values()) + ledger.unfinished,
                "wasted_by_reason": dict(sorted(ledger.wasted.items())),
            },
            "trained": {
                "groups": groups,
                "mean_tokens": ledger.trained / max(groups * options.samples_per_prompt, 1),
                "share_by_pass_rate": by_rate,
            },
            "sequential": self.stream.sequential(options, steps * options.prompts_per_step),
            "age_histogram": {str(age): self.ages[age] for age in sorted(self.ages)},
            "preemptions": sum(engine.preemptions for engine in self.engines),
            "request_failures": dict(self.fleet.request_failures),
            "engine_states": self._states,
            "controller": {
                "cpu_seconds_per_step": self._cpu_s / steps,
                "us_per_token": 1e6 * self._cpu_s / max(ledger.generated, 1),
                "peak_bytes": self._peak_bytes,
                "token_bytes_left_out": BYTES_PER_TOKEN * self._peak_tokens,
            },
        }

    def _times(self) -> dict[str, Any]:
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for engine in self.engines:
            for key, value in engine.time_in.items():
                seconds[key] += value
        of_state = {
            state: sum(s for (_, of), s in seconds.items() if of == state)
            for state in ("busy", "idle", "asleep", "down")
        }
        up = sum(of_state.values()) - of_state["down"]
        idle = {cause: seconds[phase, "idle"] / up for phase, cause in IDLE_CAUSES.items()}
        of_phase = {
            f"{name}_seconds": self.timeline.mean(name, self.steps) for name in ("rollout", "trainer", "sync")
        }
        return {
            "step_seconds": sum(of_phase.values()),
            **of_phase,
            "idle_share": sum(idle.values()),
            "idle_by_cause": idle,
            "asleep_share": of_state["asleep"] / up,
            "engine_seconds_down": of_state["down"],
        }


def _trained(group: Group) -> Trained:
    return group.prompt.position, group.weight_version, tokens_of(group), group.correct.count(True)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _resident_bytes() -> int:
    """Resident memory of this process now; where /proc is missing, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
