"""Rollouts as the trainer's main thread sees them: blocking calls; the work (rollouts.py) goes on in an event
loop on a thread of its own, also while the trainer trains.

Weights are pushed by sync/, through the methods in the middle.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient, file_descriptors_needed
from megatron_dapo.rollout.errors import EngineDied
from megatron_dapo.rollout.files import raise_file_limit
from megatron_dapo.rollout.fleet import ENGINE_ERRORS, EngineFailure, Fleet
from megatron_dapo.rollout.hosts import RemoteServer, Store
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.rollout.rollouts import Prompts, Rollouts
from megatron_dapo.rollout.sample import EvaluationSampling, Grading
from megatron_dapo.rollout.server import EngineServer, digest_folder, make_server
from megatron_dapo.rollout.serving import ServingHosts
from megatron_dapo.types import Collected, Group, Prompt

T = TypeVar("T")
SIGNAL_POLL_S = 0.2  # how often the waiting main thread lets Python run signal handlers
WATCH_S = 0.25  # how often `watch` is told how the engines are
Watch = Callable[[Mapping[str, str], Mapping[str, int], int], None]


class RolloutService:
    """The rollout side of rank 0. Call its methods from one thread; `interrupt` from a signal handler.

    grading: turns completions into groups. progress: called with (accepted groups, groups of a step).
    message: called with a sentence for the console. watch: called every WATCH_S with the states of the
    engines and the sequences that each runs, by name, and the number of requests that wait for room. All are
    called on the service's own thread. hosts: by name, those that run engines, ours first (none: ours alone);
    store: through which the others hear of them (hosts.py). fleet: the engines; made from the configuration
    unless a test hands one in.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        folder: Path,
        stop_token_ids: Sequence[int],
        prompts: Prompts,
        grading: Grading,
        progress: Callable[[int, int], None] = lambda done, total: None,
        message: Callable[[str], None] = print,
        watch: Watch = lambda states, running, waiting: None,
        hosts: Sequence[str] = (),
        store: Store | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self._config, self._watch = config, watch
        self._hosts = list(dict.fromkeys(hosts)) or [socket.gethostname()]
        self._token = secrets.token_urlsafe(16)
        self.fleet = fleet or Fleet(
            config.rollout,
            _make_replicas(config, folder, self._token, self._hosts, store),
            self._connect,
            message=message,
        )
        self.rollouts = Rollouts(
            config,
            fleet=self.fleet,
            prompts=prompts,
            grading=grading,
            stop_token_ids=stop_token_ids,
            progress=progress,
        )
        self._serving: ServingHosts | None = None
        if store is not None:
            here = len(self.fleet.replicas)
            self._serving = ServingHosts(
                config, store, self._token, self.fleet, num_engines=here, message=message
            )
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._watching: list[asyncio.Task[None]] = []

    # --- life

    def start(self) -> None:
        """Start the thread and the servers; they are up after `wait_ready`. UserError if too few files may be
        opened.
        """
        raise_file_limit(file_descriptors_needed(self._config.rollout, len(self._hosts)))
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self._run(self._start())

    def wait_ready(self) -> None:
        """Wait until every engine has come up or failed to. EngineFailure below rollout.min_engines;
        StopRequested.
        """
        self._run(self.rollouts.wait_ready())

    def interrupt(self) -> None:
        """End the call that waits now, and every later one, with StopRequested. For signal handlers: returns
        at once.
        """
        if self._thread is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.rollouts.interrupt)
        else:
            self.rollouts.interrupt()

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
        """The groups of the next step (Rollouts.next_step). StopRequested after `interrupt`; WeightsNeeded;
        EngineFailure and SamplingCapReached (UserErrors).
        """
        return self._run(self.rollouts.next_step(version))

    def submit(self, prompts: Sequence[Prompt], sampling: EvaluationSampling | None = None) -> list[Group]:
        """Sample and grade every prompt at once, by the newest weights; the groups in the order of the
        prompts. Raises what `next_step` raises.
        """
        return self._run(self.rollouts.submit(prompts, sampling))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rollouts and the prompt stream."""
        return self._run(self.rollouts.state())

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; before `start`."""
        self.rollouts.load_state(state)

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
        """No engine computes anything inside the block."""
        self.pause()
        try:
            yield self
        finally:
            self.resume()

    def pause(self) -> None:
        """Send no more requests, and return when a push may begin (Rollouts.pause)."""
        self._run(self.rollouts.pause())

    def resume(self) -> None:
        self._run(self.rollouts.resume())

    def fall_asleep(self) -> None:
        """Pause, and have every engine give its memory back, weights and cache with it (sleeping.py)."""
        self._run(self.rollouts.fall_asleep())

    def wake_weights(self) -> None:
        """Have the engines take memory for weights again. A push must follow, and `resume`."""
        self._run(self.rollouts.wake_weights())

    def push_targets(self) -> list[str]:
        """Names of the replicas that are healthy now, which the calls below are about until the next time:
        one that fails and is restarted meanwhile holds other weights, and is none of them.
        """

        async def targets() -> list[str]:
            names = await self.fleet.push_targets()
            self._targets = {replica.name: replica.client for replica in self.fleet.replicas}
            return names

        return self._run(targets())

    def where(self, name: str) -> tuple[str, int] | None:
        """The host of the replica, and the number of its first device there; None when it has left."""
        found = (replica for replica in self.fleet.replicas if replica.name == name)
        return next(((replica.host, replica.device) for replica in found), None)

    def begin_call(
        self, names: Collection[str], what: Callable[[str, EngineClient], Awaitable[Any]]
    ) -> Callable[[], dict[str, Any]]:
        """Run `what(name, client)` for these replicas at once. Calling what is returned waits for the result,
        or the error, of each; it never raises one.
        """

        async def on_target(name: str, client: EngineClient) -> Any:
            if client is not self._targets.get(name):
                raise EngineDied(f"{name} failed meanwhile, and was restarted")
            return await what(name, client)

        future = self._begin(self.fleet.call(names, on_target))
        return lambda: self._wait(future)

    def set_ready(self, name: str, version: int) -> None:
        """The replica holds this version now, and takes requests after `resume`."""

        def ready() -> None:
            self.fleet.set_ready(name, version) if self._is_target(name) else self.fleet.expect(version)

        self._run(_soon(ready))

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        """Restart the replica, whose push failed in `phase`."""
        phase = f"weights were pushed ({phase})"
        self._run(_soon(lambda: self._is_target(name) and self.fleet.set_failed(name, phase, error)))

    def _is_target(self, name: str) -> bool:
        client = self._targets.get(name)
        return client is not None and any(replica.client is client for replica in self.fleet.replicas)

    # --- verification of a push

    def load_once(self, export: Path) -> Path:
        """Start a server on an exported checkpoint and stop it again. With run.verify_sync it has written
        digests of what it loaded into `fresh` of the folder that this returns, beside those of the engines.
        EngineFailure when it does not start.
        """
        slot = self._config.rollout.engines
        index = 1 + max((int(replica.name.split("_")[1]) for replica in self.fleet.replicas), default=-1)

        async def load() -> None:
            failure: BaseException | None = None
            for _ in range(
                2
            ):  # a port that was free may be taken before the server has it; a new one is chosen
                server = make_server(
                    self._config, index, export, self._token, digests="fresh", slot=slot, load_format="auto"
                )
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

    def _connect(self, server: EngineServer | RemoteServer) -> EngineClient:
        limit_s = self._config.rollout.progress_timeout_s
        return EngineClient(server.url, self._token, progress_timeout_s=limit_s)

    async def _start(self) -> None:
        await self.rollouts.start()
        self._watching.append(asyncio.create_task(self._tell()))
        if self._serving is not None:
            self._serving.open()
            self._watching.append(asyncio.create_task(self._serving.watch()))

    async def _tell(self) -> None:
        """Tell `watch` how the engines are, as long as the service lives."""
        while True:
            running = {replica.name: replica.load() for replica in self.fleet.replicas}
            self._watch(self.replica_states(), running, self.fleet.router.num_waiting)
            await asyncio.sleep(WATCH_S)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the service's loop and wait for it."""
        return self._wait(self._begin(work))

    def _begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed() or not self._loop.is_running() and self._thread is None:
            work.close()
            raise RuntimeError("the rollout service is not started, or closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, future: concurrent.futures.Future[T]) -> T:
        while not concurrent.futures.wait([future], timeout=SIGNAL_POLL_S).done:
            pass  # a signal that another thread received is handled here, in the main thread
        return future.result()

    async def _shut_down(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.rollouts.stop()
        if self._serving is not None:
            await self._serving.close()
        await asyncio.get_running_loop().shutdown_default_executor()


def _make_replicas(
    config: RunConfig, folder: Path, token: str, hosts: Sequence[str], store: Store | None
) -> list[Replica]:
    """engine_0, engine_1, ..., rollout.engines for each host, here on the model in `folder`; none unless
    rollout.colocated.
    """
    rollout = config.rollout

    def make(index: int, host: str) -> EngineServer | RemoteServer:
        if host == hosts[0]:
            return make_server(config, index, folder, token, digests=f"engine_{index}")
        assert store is not None, "engines of other hosts need a store"
        return RemoteServer(store, index, host, token)

    replicas = []
    for index in range(len(hosts) * rollout.engines if rollout.colocated else 0):
        number, slot = divmod(index, rollout.engines)
        host, server = hosts[number], make(index, hosts[number])
        device = slot * rollout.tensor_parallel
        replicas.append(Replica(name=f"engine_{index}", server=server, host=host, device=device))
    return replicas


async def _soon(act: Callable[[], Any]) -> None:
    """A plain call, on the loop's thread."""
    act()
