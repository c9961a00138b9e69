"""How engines come up and go: a replica is started, restarted when it fails, or taken out for good.

Everything here runs inside the event loop of the fleet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from megatron_dapo.config import RolloutConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.replica import Client, Replica, ReplicaState, RestartBudget, last_words
from megatron_dapo.rollout.router import Router

# What may go wrong with an engine; anything else is a fault of this code.
ENGINE_ERRORS = (EngineDied, RequestFailed, TimeoutError, OSError, UserError)


class EngineFailure(UserError):
    """Too few engines live, or a request fails wherever it is sent. The message names the root causes."""


class Upkeep:
    """Keeps `replicas` running, and takes those out that leave. A server starts when `before_start` returns;
    the other arguments are those of Fleet.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        replicas: list[Replica],
        router: Router,
        connect: Callable[[Any], Client],
        *,
        message: Callable[[str], None],
        before_start: Callable[[Replica], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._rollout, self._replicas, self._router = rollout, replicas, router
        self._connect, self._message, self._before_start = connect, message, before_start
        self._budget = RestartBudget(rollout.max_restarts, clock)
        self._tasks: set[asyncio.Task[None]] = set()  # replicas on their way up or down

    def start(self, replica: Replica) -> None:
        """Its first start; returns at once."""
        replica.state = ReplicaState.STARTING
        self._in_background(self._first_start(replica))

    def restart_dead(self) -> None:
        """Start replicas again that were left dead because too many had been restarted within an hour."""
        for replica in self._replicas:
            if replica.state is ReplicaState.DEAD and not replica.replacing and self._budget.grant():
                replica.replacing = True
                self._in_background(self._bring_up(replica))

    def fail(self, replica: Replica, client: Client | None, phase: str, error: BaseException) -> None:
        """Take a replica out and replace it. Nothing happens if that has begun, or if `client` is no longer
        its client.
        """
        if client is None or replica.client is not client:
            return
        replica.client, replica.state, replica.version = None, ReplicaState.DEAD, None
        replica.replacing = True
        replica.error = f"{replica.name} failed while {phase}: {words(error)}"
        self._in_background(self._replace(replica, client, hung=isinstance(error, TimeoutError)))
        self._router.dispatch()

    async def close(self) -> None:
        """Give up what is on its way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- taking replicas out

    def leave(self, replicas: Iterable[Replica], out: Callable[[], None]) -> None:
        """They get no further request and end those that they have; then they are stopped and no longer among
        the replicas, and `out` is called. Returns at once.
        """
        leaving = list(replicas)
        for replica in leaving:
            replica.leaving = True
            if replica.state is ReplicaState.READY:
                replica.state = ReplicaState.DRAINING
        self._router.dispatch()

        async def take_out() -> None:
            await asyncio.gather(*map(self._drain, leaving))
            out()

        self._in_background(take_out())

    def lose(self, replicas: Iterable[Replica], reason: str) -> None:
        """Their host is gone: take them out at once."""
        for replica in replicas:
            replica.leaving = True
            self.fail(replica, replica.client, "serving", EngineDied(reason))
            if replica.state is ReplicaState.DEAD and not replica.replacing:
                self._remove(replica)

    async def _drain(self, replica: Replica) -> None:
        """Return when it is out. While weights are pushed it stays: it may have requests that stand still."""
        if replica.state is ReplicaState.STARTING:
            await asyncio.to_thread(replica.server.stop)  # the start fails, and then `_restart` removes it
        elif replica.state is ReplicaState.DEAD and not replica.replacing:
            self._remove(replica)

        def is_free() -> bool:
            idle = replica.client is not None and not replica.in_flight and not self._router.paused
            return idle or replica not in self._replicas

        await self._router.until(is_free, raise_the_end=False)
        if replica in self._replicas:
            client, replica.client = replica.client, None
            self._remove(replica)
            if client is not None:
                await client.close()
            await asyncio.to_thread(replica.server.stop)

    def _remove(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        replica.state, replica.replacing = ReplicaState.DEAD, False
        if (living := self._num_living()) < self._rollout.min_engines:
            self._router.end(EngineFailure(self._too_few(living, f"{replica.name} has left")))
        self._router.dispatch()
        self._router.notify()

    # --- starting and replacing

    async def _first_start(self, replica: Replica) -> None:
        if not await self._try_start(replica):
            await self._restart(replica)

    async def _replace(self, replica: Replica, client: Client, *, hung: bool) -> None:
        """Stop a replica that failed, say why with the words of its log, and start it again."""
        await client.close()
        replica.error += await last_words(replica, hung=hung)
        self._message(replica.error)
        await asyncio.to_thread(replica.server.stop)
        await self._router.until(lambda: replica.in_flight == 0, raise_the_end=False)
        await self._restart(replica)

    async def _bring_up(self, replica: Replica) -> None:
        """After a restart was granted: start, and start again while that is granted too."""
        self._message(f"{replica.name} is started again")
        if not await self._try_start(replica):
            await self._restart(replica)

    async def _restart(self, replica: Replica) -> None:
        """Start again if this may be; else leave the replica dead, and end the run if too few live. One that
        leaves, or whose host is gone, is taken out.
        """
        if replica.leaving or not await replica.host_lives():
            return self._remove(replica) if replica in self._replicas else None
        if self._budget.grant():
            return await self._bring_up(replica)
        replica.state, replica.replacing = ReplicaState.DEAD, False
        if (living := self._num_living()) < self._rollout.min_engines:
            self._router.end(EngineFailure(self._too_few(living, self._used_up())))
        else:
            self._message(
                f"{replica.name} is left out: {self._used_up()}; the run goes on with {living} of "
                f"{len(self._replicas)} engines"
            )
            self._router.dispatch()

    async def _try_start(self, replica: Replica) -> bool:
        """Whether the server came up; it then has no weights but those of the model folder."""
        replica.state = ReplicaState.STARTING
        client: Client | None = None
        try:
            await self._before_start(replica)
            if replica.leaving:
                return False
            replica.server.start()
            await replica.server.wait_healthy(self._rollout.start_timeout_s)
            client = self._connect(replica.server)
            await client.warm_up(self._rollout.start_timeout_s)
            await client.init_weight_transfer()
        except asyncio.CancelledError:
            if client is not None:
                await client.close()
            raise
        except ENGINE_ERRORS as error:
            replica.was_started = True
            replica.error = f"{replica.name} did not start: {words(error)}"
            if client is not None:  # it came up, so the error does not quote the log yet
                await client.close()
                replica.error += await last_words(replica, hung=isinstance(error, TimeoutError))
            if not replica.leaving:
                self._message(replica.error)
            await asyncio.to_thread(replica.server.stop)
            self._router.notify()
            return False
        replica.client, replica.state, replica.version = client, ReplicaState.STALE, None
        replica.was_started, replica.replacing = True, False
        self._router.dispatch()
        self._router.notify()
        return True

    # --- how many are enough

    def _num_living(self) -> int:
        return sum(replica.state is not ReplicaState.DEAD or replica.replacing for replica in self._replicas)

    def _too_few(self, living: int, why: str) -> str:
        errors = "\n".join(replica.error for replica in self._replicas if replica.error)
        return (
            f"{living} of {len(self._replicas)} engines live, fewer than "
            f"rollout.min_engines={self._rollout.min_engines}, and {why}\n{errors}"
        )

    def _used_up(self) -> str:
        return f"rollout.max_restarts={self._rollout.max_restarts} is used up for this hour"

    # --- plumbing

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._router.end(error)  # a fault of this code ends the run with its traceback


def words(error: BaseException) -> str:
    return str(error) or type(error).__name__
