"""Rollouts as the trainer's main thread sees them: blocking calls; the work goes on in an event loop on a
thread of its own.

The service owns the engines (fleet.py), the collector of training groups (collect.py) and what samples a
group (sample.py). It never sees the report or the weights: weights are pushed by sync/, through the five
methods at the end.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient, file_descriptors_needed
from megatron_dapo.rollout.collect import Collector, Prompts
from megatron_dapo.rollout.files import raise_file_limit
from megatron_dapo.rollout.fleet import ENGINE_ERRORS, EngineFailure, Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.sample import EvaluationSampling, Grade, GroupSampler
from megatron_dapo.rollout.server import EngineServer, digest_folder, make_server
from megatron_dapo.types import Collected, Group, Prompt

T = TypeVar("T")
SIGNAL_POLL_S = 0.2  # how often the waiting main thread lets Python run signal handlers


class StopRequested(Exception):
    """`interrupt` was called: the running step is given up, everything finished before it is kept."""


class WeightsNeeded(Exception):
    """No replica holds the weights that requests wait for, though some are up. Push the weights and call
    again: what was finished is kept.
    """


class RolloutService:
    """The rollout side of rank 0. Call its methods from one thread; `interrupt` from a signal handler.

    grade: turns the completions of a prompt into a Group. progress: called with (accepted groups, groups of a
    step). message: called with a sentence for the console. All three are called on the service's own thread.
    fleet: the engines; made from the configuration unless a test hands one in.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        folder: Path,
        stop_token_ids: Sequence[int],
        prompts: Prompts,
        grade: Grade,
        progress: Callable[[int, int], None] = lambda done, total: None,
        message: Callable[[str], None] = print,
        fleet: Fleet | None = None,
    ) -> None:
        self._config = config
        self._token = secrets.token_urlsafe(16)
        self.fleet = fleet or _make_fleet(config, folder, self._token, message)
        self._sampler = GroupSampler(
            generate=self.fleet.generate,
            grade=grade,
            run_seed=config.run.seed,
            seeded=config.rollout.seeded,
            options={"max_tokens": config.rollout.max_tokens, "stop_token_ids": tuple(stop_token_ids)},
        )
        self.collector = Collector(
            prompts=prompts,
            sample=self._sample_to_train,
            config=config.sampling,
            one_round_at_a_time=config.rollout.seeded,
            progress=progress,
        )
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._task: asyncio.Task[Any] | None = None  # what next_step, submit or wait_ready waits for
        self._task_name = ""

    # --- life

    def start(self) -> None:
        """Start the thread and the servers; they are up after `wait_ready`. UserError if too few files may be
        opened.
        """
        raise_file_limit(file_descriptors_needed(self._config.rollout))
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self._run(self.fleet.start())

    def wait_ready(self) -> None:
        """Wait until every engine has come up or failed to. EngineFailure below rollout.min_engines;
        StopRequested.
        """
        self._run(self._result("start", self.fleet.wait_ready))

    def interrupt(self) -> None:
        """End the call that waits now, and every later one, with StopRequested. For signal handlers: returns
        at once.
        """
        self._stopping = True
        if self._thread is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_task)

    def close(self) -> None:
        """Stop the engines, whatever state they are in, and the thread. May be called twice, and before
        `start`.
        """
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._run(self._shut_down())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
        if not self._loop.is_closed():
            self._loop.close()

    # --- sampling

    def next_step(self, version: int) -> Collected:
        """The groups of the next step, sampled by weight version `version` or carried over (collect.py).

        StopRequested after `interrupt`; WeightsNeeded; EngineFailure and SamplingCapReached (UserErrors).
        """

        async def collect() -> Collected:
            self.fleet.expect(version)
            self.fleet.restart_dead()
            return await self.collector.collect(version)

        return self._run(self._result(f"step {version}", collect))

    def submit(self, prompts: Sequence[Prompt], sampling: EvaluationSampling | None = None) -> list[Group]:
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

        return self._run(self._result("evaluation", sample_all))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the collector; a step that was given up counts as not begun."""
        return self.collector.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.collector.load_state(state)

    @property
    def request_failures(self) -> Counter[str]:
        """Requests that failed and were sent again, by reason."""
        return self.fleet.request_failures

    def replica_states(self) -> dict[str, str]:
        """starting, ready, stale, draining or dead, by the engine's name."""
        return {replica.name: str(replica.state) for replica in self.fleet.replicas}

    # --- weights (the `Replicas` of sync/publish.py)

    @contextmanager
    def paused(self) -> Iterator[RolloutService]:
        """Nothing is in flight on any replica inside the block."""
        self.pause()
        try:
            yield self
        finally:
            self.resume()

    def pause(self) -> None:
        """Send no more requests; return when none is in flight on any replica. With sampling.max_age >= 1
        that takes as long as the longest request that the last step left running; after `interrupt` those
        are given up.
        """
        if self._stopping:
            self._run(self.collector.stop())
        self._run(self.fleet.pause())

    def resume(self) -> None:
        self._run(_soon(self.fleet.resume))

    def push_targets(self) -> list[str]:
        """Names of the replicas that are healthy now."""
        return self._run(self.fleet.push_targets())

    def call(
        self, names: Collection[str], what: Callable[[EngineClient], Awaitable[None]]
    ) -> dict[str, BaseException | None]:
        """Run `what` on the clients of these replicas at once; the error of each or None. Never raises."""
        return self._run(self.fleet.call(names, what))

    def set_ready(self, name: str, version: int) -> None:
        """The replica holds this version now, and takes requests after `resume`."""
        self._run(_soon(lambda: self.fleet.set_ready(name, version)))

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        """Restart the replica, whose push failed in `phase`."""
        self._run(_soon(lambda: self.fleet.set_failed(name, f"weights were pushed ({phase})", error)))

    # --- verification of a push

    def load_once(self, export: Path) -> Path:
        """Start a server on an exported checkpoint and stop it again. With run.verify_sync it has written
        digests of what it loaded into `fresh` of the folder that this returns, beside those of the engines.
        EngineFailure when it does not start.
        """
        index = len(self.fleet.replicas)

        async def load() -> None:
            failure: BaseException | None = None
            for _ in range(
                2
            ):  # a port that was free may be taken before the server has it; a new one is chosen
                server = make_server(self._config, index, export, self._token, digests="fresh")
                server.start()
                try:
                    return await server.wait_healthy(self._config.rollout.start_timeout_s)
                except ENGINE_ERRORS as error:
                    failure = error
                finally:
                    await asyncio.to_thread(server.stop)
            raise EngineFailure(
                f"the server that was to verify the weights did not start: {failure}"
            ) from failure

        self._run(load())
        return digest_folder(self._config)

    # --- the loop

    async def _sample_to_train(self, prompt: Prompt) -> Group:
        n, temperature = self._config.sampling.samples_per_prompt, self._config.rollout.temperature
        return await self._sampler.to_train(prompt, n=n, temperature=temperature)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the service's loop and wait for it."""
        if self._loop.is_closed() or not self._loop.is_running() and self._thread is None:
            work.close()
            raise RuntimeError("the rollout service is not started, or closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not concurrent.futures.wait([future], timeout=SIGNAL_POLL_S).done:
            pass  # a signal that another thread received is handled here, in the main thread
        return future.result()

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

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _shut_down(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.collector.stop()
        await self.fleet.close()
        await asyncio.get_running_loop().shutdown_default_executor()


def _make_fleet(config: RunConfig, folder: Path, token: str, message: Callable[[str], None]) -> Fleet:
    """Replicas engine_0, engine_1, ... of servers on the model in `folder`."""

    def connect(server: EngineServer) -> EngineClient:
        return EngineClient(server.url, token, progress_timeout_s=config.rollout.progress_timeout_s)

    replicas = [
        Replica(
            name=f"engine_{index}",
            server=make_server(config, index, folder, token, digests=f"engine_{index}"),
        )
        for index in range(config.rollout.engines)
    ]
    return Fleet(config.rollout, replicas, connect, message=message)


async def _soon(act: Callable[[], None]) -> None:
    """A plain call, on the loop's thread."""
    act()


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; when one raises, the others are cancelled and ended before it is raised here."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
