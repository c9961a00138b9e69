"""All engines of a run: which of them takes a request, and what happens when one fails.

A fault stays where it happens: a request that fails is sent again, elsewhere if there is an elsewhere; an
engine that dies or hangs is restarted while the others go on; the run ends only below rollout.min_engines.
Everything here runs inside one event loop (service.py).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.errors import EngineDied, EngineStalled, RequestFailed
from megatron_dapo.rollout.replica import Client, Replica, ReplicaState, Request
from megatron_dapo.rollout.router import Router
from megatron_dapo.rollout.upkeep import ENGINE_ERRORS, EngineFailure, Upkeep
from megatron_dapo.types import Completion, Partial

MAX_FAILURES = 3  # of one request, before it ends the run


class Fleet:
    """The replicas of a run. `connect` makes the client of a server that is up; `clock` counts seconds.

    `message` gets a sentence for the console; it is called from the event loop.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        replicas: Sequence[Replica],
        connect: Callable[[Any], Client],
        *,
        message: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = list(replicas)
        self.version: int | None = None  # the weights that may be sampled from
        self.request_failures: Counter[str] = Counter()  # by reason
        self.router = Router(self.replicas, rollout.max_concurrency)
        self.before_start: Callable[[Replica], Awaitable[None]] = _at_once  # a server starts when it returns
        self._rollout, self._message = rollout, message
        self._upkeep = Upkeep(
            rollout,
            self.replicas,
            self.router,
            connect,
            message=message,
            before_start=lambda replica: self.before_start(replica),
            clock=clock,
        )
        self._in_flight: dict[str, Request] = {}  # those with a key, by the id that their server knows
        self._numbers = itertools.count()

    # --- starting and ending

    async def start(self) -> None:
        """Start every server; returns at once."""
        for replica in self.replicas:
            self._upkeep.start(replica)

    async def wait_ready(self) -> None:
        """Return when every server has come up or failed to, and rollout.min_engines are up. EngineFailure if
        they cannot.
        """
        await self.router.until(
            lambda: (
                all(replica.was_started for replica in self.replicas)
                and sum(replica.client is not None for replica in self.replicas) >= self._rollout.min_engines
            )
        )

    async def close(self) -> None:
        """Close the clients and stop the servers, whatever state they are in."""
        await self._upkeep.close()
        for replica in self.replicas:
            client, replica.client, replica.state = replica.client, None, ReplicaState.DEAD
            if client is not None:
                await client.close()
        await asyncio.gather(*(asyncio.to_thread(replica.server.stop) for replica in self.replicas))

    # --- requests

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        *,
        n: int,
        seed_of: Callable[[int], int | None],
        key: int | None = None,
        begins: Callable[[str], None] = lambda engine: None,
        **options: Any,
    ) -> list[Completion]:
        """`n` completions of one prompt from the least loaded replica that has the weights
        (EngineClient.generate). `seed_of` gives the seed by the weight version that samples. `key` names the
        request for `partials`; those without one go before the others that wait for room.

        A request that fails is made again in full, on a replica that it did not fail on if there is one: to
        keep the completions that it had ended would prefer short ones. `begins` is called with the replica's
        name before each attempt. EngineFailure after MAX_FAILURES of its own (an engine that dies or hangs is
        the engine's failure), or when too few engines live.
        """
        failures: dict[str, RequestFailed] = {}
        num_failures = 0
        while True:
            replica = await self.router.acquire(n, avoid=failures, first=key is None)
            client, version = replica.client, replica.version
            request_id = None
            try:
                if client is None or version is None:  # it failed between the grant and now
                    continue
                if key is not None:
                    request_id = f"{key}-{next(self._numbers)}"
                    self._in_flight[request_id] = Request(key, replica.name, client)
                begins(replica.name)
                return await client.generate(
                    prompt_tokens,
                    n=n,
                    weight_version=version,
                    seed=seed_of(version),
                    request_id=request_id,
                    **options,
                )
            except RequestFailed as error:
                self.request_failures[error.reason] += 1
                if self.request_failures[error.reason] == 1:  # later ones are only counted
                    self._message(f"{replica.name} failed a request, which is sent again: {error}")
                failures[replica.name] = error
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    where = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
                    raise EngineFailure(
                        f"a request failed {num_failures} times, the last on {where}"
                    ) from error
            except (EngineDied, TimeoutError) as error:
                stalled = isinstance(error, EngineStalled)
                self.request_failures["engine_stalled" if stalled else "engine_died"] += 1
                self._fail(replica, client, "generating", error)
            finally:
                if request_id is not None:
                    del self._in_flight[request_id]
                self.router.release(replica, n)

    def engines_of_requests(self) -> dict[int, str]:
        """The replica's name of each request with a key that is in flight."""
        return {request.key: request.engine for request in self._in_flight.values()}

    async def partials(self) -> tuple[dict[int, tuple[Partial, ...]], set[str]]:
        """The beginnings of the requests in flight that have a key, by key, and the replicas that do not tell
        theirs. Requests that are on their way to a replica, or whose answer is on its way, are missing.
        """
        asked = dict(self._in_flight)
        found, silent = dict[int, tuple[Partial, ...]](), set[str]()

        async def of(engine: str, client: Client) -> None:
            try:
                async with asyncio.timeout(self._rollout.progress_timeout_s):
                    told = await client.partials()
            except ENGINE_ERRORS:
                silent.add(engine)
            else:
                found.update({asked[name].key: began for name, began in told.items() if name in asked})

        clients = {request.engine: request.client for request in asked.values()}
        await asyncio.gather(*(of(engine, client) for engine, client in clients.items()))
        return found, silent

    # --- weights

    def expect(self, version: int) -> None:
        """From now on only replicas with weight version `version` take requests."""
        self.version = version
        for replica in self.replicas:
            if replica.state is ReplicaState.READY and replica.version != version:
                replica.state = ReplicaState.STALE
        self.router.dispatch()

    async def pause(self, *, keep: bool = False) -> None:
        """Send no more requests; return when no replica has one in flight, here or on its server. `keep`:
        when all stand still instead, with the requests that they have.
        """
        self.router.paused = True
        for replica in self.replicas:
            if replica.state is ReplicaState.READY:
                replica.state = ReplicaState.DRAINING
        if keep:
            limit_s = self._rollout.progress_timeout_s
            return await self._on_each(
                self._with_clients(), "being paused", lambda client: client.pause("keep"), limit_s
            )
        await self.router.until(
            lambda: not any(replica.in_flight for replica in self.replicas), raise_the_end=False
        )
        await self._on_each(self._with_clients(), "draining", lambda client: client.wait_idle())

    async def resume(self, *, kept: bool = False) -> None:
        """Send requests again, to the replicas that hold the weights. `kept`: the replicas go on with what
        `pause(keep=True)` left them.
        """
        if kept:
            limit_s = self._rollout.progress_timeout_s
            await self._on_each(self._with_clients(), "going on", lambda client: client.resume(), limit_s)
        self.router.paused = False
        for replica in self.replicas:
            if replica.state is ReplicaState.DRAINING and not replica.leaving:
                current = replica.version == self.version
                replica.state = ReplicaState.READY if current else ReplicaState.STALE
        self.router.dispatch()
        self.router.notify()

    async def push_targets(self) -> list[str]:
        """Names of the replicas that are healthy, each probed now; those that are not are restarted."""
        self.restart_dead()

        async def probe(client: Client) -> None:
            if not await client.health():
                raise EngineDied("it does not answer, or says that its engine is broken")

        await self._on_each(self._with_clients(), "idle", probe)
        return [replica.name for replica in self._with_clients()]

    async def call(
        self, names: Collection[str], what: Callable[[str, Any], Awaitable[Any]]
    ) -> dict[str, Any]:
        """Run `what(name, client)` for these replicas at once; the result or error of each. Never raises."""

        async def on(name: str) -> Any:
            replica = self._named(name)
            if replica is None or replica.client is None:
                raise EngineDied(f"{name} failed meanwhile: {replica.error if replica else 'it has left'}")
            return await what(name, replica.client)

        results = await asyncio.gather(*(on(name) for name in names), return_exceptions=True)
        return dict(zip(names, results, strict=True))

    def set_ready(self, name: str, version: int) -> None:
        """The replica holds this version now."""
        replica = self._named(name)
        if replica and replica.client is not None:
            replica.version = version
            replica.state = ReplicaState.DRAINING if replica.leaving else ReplicaState.READY
        self.expect(version)

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        """Restart the replica: what it holds is unknown. `phase` says what it failed in, for the console."""
        if replica := self._named(name):
            self._fail(replica, replica.client, phase, error)

    def restart_dead(self) -> None:
        """Start replicas again that were left dead because too many had been restarted within an hour."""
        self._upkeep.restart_dead()

    # --- replicas that come, fail and go

    def add(self, replica: Replica) -> None:
        """Start one more; it serves after the next push."""
        self.replicas.append(replica)
        self._upkeep.start(replica)

    def leave(self, names: Collection[str], out: Callable[[], None]) -> None:
        """Take replicas out once they have ended their requests; `out` is called then."""
        self._upkeep.leave([replica for replica in self.replicas if replica.name in names], out)

    def lose(self, names: Collection[str], reason: str) -> None:
        """Take replicas out whose host is gone."""
        self._upkeep.lose([replica for replica in self.replicas if replica.name in names], reason)

    def _fail(self, replica: Replica, client: Client | None, phase: str, error: BaseException) -> None:
        """Take a replica out and replace it, unless `client` is no longer its client."""
        self._upkeep.fail(replica, client, phase, error)

    # --- plumbing

    def _named(self, name: str) -> Replica | None:
        """None when it has left."""
        return next((replica for replica in self.replicas if replica.name == name), None)

    def _with_clients(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.client is not None]

    async def _on_each(
        self,
        replicas: Sequence[Replica],
        phase: str,
        what: Callable[[Client], Awaitable[Any]],
        limit_s: float | None = None,
    ) -> None:
        """Run `what` on the clients of these replicas at once; a replica on which it raises, or takes longer
        than `limit_s`, has failed.
        """

        async def on(replica: Replica, client: Client) -> None:
            try:
                async with asyncio.timeout(limit_s):
                    await what(client)
            except ENGINE_ERRORS as error:
                self._fail(replica, client, phase, error)

        await asyncio.gather(
            *(on(replica, replica.client) for replica in replicas if replica.client is not None)
        )


async def _at_once(replica: Replica) -> None:
    """Nothing has to be waited for."""
