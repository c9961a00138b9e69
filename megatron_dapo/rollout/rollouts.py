"""Rollouts inside an event loop: the engines (fleet.py), the collector of training groups (collect.py) and
what samples a group (sample.py), wired together.

service.py drives this on a thread of its own, simulate.py on virtual time. It never sees the report or the
weights: weights are pushed between `pause` and `resume`, through `fleet`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.collect import Collector
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.sample import EvaluationSampling, Grading, GroupSampler
from megatron_dapo.rollout.sleeping import Sleep
from megatron_dapo.types import Collected, Completion, Group, Partial, Prompt

T = TypeVar("T")
LOOKS, LOOK_S = 5, 0.05  # for requests that are on their way to an engine, or whose answers are on their way


class StopRequested(Exception):
    """`interrupt` was called: the running step is given up, everything finished before it is kept."""


class WeightsNeeded(Exception):
    """No replica holds the weights that requests wait for, though some are up. Push the weights and call
    again: what was finished is kept.
    """


class Prompts(Protocol):
    """The prompt stream and its cursor."""

    def next(self) -> Prompt | None: ...

    def record(self, prompt: Prompt, accuracy: float) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Rollouts:
    """The rollout side of a run. Call it from one event loop, one step, evaluation or push after another.

    grading: turns completions into groups. progress: called with (accepted groups, groups of a step). clock:
    seconds of Group.timing.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        fleet: Fleet,
        prompts: Prompts,
        grading: Grading,
        stop_token_ids: Sequence[int] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fleet = fleet
        self._sleep = Sleep(fleet)
        self._config, self._prompts = config, prompts
        self._sampler = GroupSampler(
            generate=fleet.generate,
            grading=grading,
            run_seed=config.run.seed,
            seeded=config.rollout.seeded,
            options={"max_tokens": config.rollout.max_tokens, "stop_token_ids": tuple(stop_token_ids)},
            clock=clock,
        )
        self.collector = Collector(
            prompts=prompts,
            sample=self._sample_to_train,
            config=config.sampling,
            one_round_at_a_time=config.rollout.seeded,
            progress=progress,
        )
        self._stopping = False
        self._last_state: dict[str, Any] | None = None  # as it was when running requests were given up
        self._task: asyncio.Task[Any] | None = None  # what next_step, submit or wait_ready waits for
        self._task_name = ""

    # --- life

    async def start(self) -> None:
        """Start the servers; they are up after `wait_ready`."""
        await self.fleet.start()

    async def wait_ready(self) -> None:
        """Wait until every engine has come up or failed to. EngineFailure below rollout.min_engines;
        StopRequested.
        """
        await self._result("start", self.fleet.wait_ready)

    def interrupt(self) -> None:
        """End the call that waits now, and every later one, with StopRequested."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Give up what runs, and stop the engines, whatever state they are in."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.collector.stop()
        await self.fleet.close()

    # --- sampling

    async def next_step(self, version: int) -> Collected:
        """The groups of the next step, sampled by weight version `version` or before it (collect.py).

        StopRequested after `interrupt`; WeightsNeeded; EngineFailure and SamplingCapReached (UserErrors).
        """

        async def collect() -> Collected:
            self.fleet.expect(version)
            self.fleet.restart_dead()
            return await self.collector.collect(version)

        return await self._result(f"step {version}", collect)

    async def submit(
        self, prompts: Sequence[Prompt], sampling: EvaluationSampling | None = None
    ) -> list[Group]:
        """Sample and grade every prompt at once, by the newest weights; the groups in the order of the
        prompts.

        `sampling`: default the configuration's. Raises what `next_step` raises.
        """
        options = self._config.evaluation
        chosen = sampling or EvaluationSampling(
            n=options.samples, temperature=options.temperature, top_p=options.top_p
        )

        async def sample_all() -> list[Group]:
            return await _all([self._sampler.to_evaluate(prompt, chosen) for prompt in prompts])

        return await self._result("evaluation", sample_all)

    async def _sample_to_train(self, prompt: Prompt, began: Sequence[Partial]) -> Group:
        n, temperature = self._config.sampling.samples_per_prompt, self._config.rollout.temperature
        return await self._sampler.to_train(prompt, n=n, temperature=temperature, began=began)

    # --- around a push

    @property
    def _stands_still(self) -> bool:
        """Whether running requests are frozen for a push; else it waits for them."""
        return self.collector.is_continuous and self._config.rollout.inflight_updates

    async def pause(self) -> None:
        """Send no more requests, and return when a push may begin. With sampling.max_age >= 1 and
        rollout.inflight_updates running requests stand still; otherwise they are waited for, but after
        `interrupt` only their beginnings are kept. Engines that sleep are paused already.
        """
        if self._sleep.asleep:
            return
        if self._stopping and not self._stands_still:
            self._last_state = await self.state()
            await self.collector.stop()
        await self.fleet.pause(keep=self._stands_still)

    async def resume(self) -> None:
        """Go on, by the weights that the fleet holds now; engines that sleep wake up for it."""
        if self._sleep.asleep:
            await self._sleep.wake_cache()
        await self.fleet.resume(kept=self._stands_still)
        if self.fleet.version is not None:
            self.collector.weights_changed(self.fleet.version)

    async def fall_asleep(self) -> None:
        """Pause; return when no engine holds weights or cache, until `wake_weights` (sleeping.py)."""
        await self.pause()
        await self._sleep.fall_asleep()

    async def wake_weights(self) -> None:
        """Return when a push may begin, after which `resume` wakes the rest."""
        await self._sleep.wake_weights()

    # --- checkpoints

    async def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the collector's state with the beginnings of all running responses, and
        the cursor of the prompts. Sampling goes on meanwhile.
        """
        if self._last_state is not None:
            return self._last_state
        beginnings, lost = await self._beginnings() if self.collector.is_continuous else ({}, set[str]())
        return self.collector.state(beginnings, lost) | {"prompts": self._prompts.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, before the first step."""
        self.collector.load_state(state)
        self._prompts.load_state(state["prompts"])

    async def _beginnings(self) -> tuple[dict[int, Sequence[Partial]], Collection[str]]:
        """The beginnings of all training responses that run, by position, and the engines that do not tell
        theirs.

        An engine does not know a request that has not come to it yet, nor one whose answer is on its way:
        these are looked for again a moment later. What was found first is kept: a later look knows only the
        longer ones.
        """
        asked, found, silent = self.fleet.engines_of_requests(), dict[int, Sequence[Partial]](), set[str]()
        for look in range(LOOKS):
            if look:
                await asyncio.sleep(LOOK_S)
            told, silent = await self.fleet.partials()
            found = {**told, **found}
            still = self.fleet.engines_of_requests()
            asked = {key: name for key, name in asked.items() if key not in found and still.get(key) == name}
            if not asked or set(asked.values()) <= silent:
                break
        graded = {key: _partials(completions) for key, completions in self._sampler.answered.items()}
        return {**graded, **found}, silent | set(asked.values())

    # --- what is waited for

    async def _result(self, name: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a task that outlives WeightsNeeded: the next call of the same name waits for it
        again.
        """
        if self._task is None and not self._stopping:
            self._task, self._task_name = asyncio.create_task(make()), name
        task = self._task
        if task is None:
            raise StopRequested
        assert name == self._task_name, f"{name} while {self._task_name} is not finished"
        needed = asyncio.create_task(self.fleet.router.weights_needed.wait())
        try:
            await asyncio.wait({task, needed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            needed.cancel()
        if self._stopping:
            await asyncio.wait({task})  # `interrupt` has cancelled it; the collector gives the step up
        if not task.done():
            raise WeightsNeeded
        self._task = None
        if task.cancelled():
            raise StopRequested
        return task.result()


def _partials(completions: Sequence[Completion]) -> tuple[Partial, ...]:
    """Finished responses as beginnings that nothing is added to."""
    return tuple(
        Partial(tokens=c.tokens, logprobs=c.logprobs, versions=c.versions, finish_reason=c.finish_reason)
        for c in completions
    )


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; when one raises, the others are cancelled and ended before it is raised here."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
