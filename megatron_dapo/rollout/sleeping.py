"""Engines that share their devices with the policy sleep while it trains (rollout.sleep).

Asleep an engine holds neither weights nor cache. It wakes in two parts: room for the weights, which a push
then brings, and room for the cache. Meanwhile no server starts, because it would want the memory that the
policy has: one that has failed is started again at the wake-up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica, ReplicaState

SETTLE_POLL_S = 0.02


class Sleep:
    """Puts the engines of a fleet to sleep and wakes them up: fall_asleep, wake_weights, a push, wake_cache.
    No request may run meanwhile. An engine that cannot fall asleep or wake up has failed, and is restarted
    like any other; none of these raises for it.

    asleep: from the first of these to the last.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.asleep = False
        self._fleet = fleet
        self._sleepers: dict[str, Any] = {}  # clients, by the replica's name; a restarted one has another
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._waiting: set[str] = set()  # replicas whose server is stopped, and will start at the wake-up
        fleet.before_start = self._wait_to_start

    async def fall_asleep(self) -> None:
        """Return when no engine holds memory: each sleeps or is stopped. One that is starting is waited
        for.
        """
        self.asleep = True
        self._may_start.clear()
        await self._no_server_alone()
        replicas = self._fleet.replicas
        self._sleepers = {replica.name: replica.client for replica in replicas if replica.client is not None}
        await self._on_sleepers("falling asleep", lambda client: client.sleep())
        await self._no_server_alone()
        for replica in replicas:
            replica.version = None  # what it held is gone

    async def wake_weights(self) -> None:
        """Give the engines room for weights, which they must be sent now, and start those that wait."""
        self._may_start.set()
        await self._on_sleepers("waking up for weights", lambda client: client.wake_up("weights"))

    async def wake_cache(self) -> None:
        """Give the engines their cache back; then they can take requests."""
        await self._on_sleepers("waking up", lambda client: client.wake_up("kv_cache"))
        self._sleepers, self.asleep = {}, False

    async def _on_sleepers(self, phase: str, what: Callable[[Any], Awaitable[None]]) -> None:
        """Run `what` on the clients of all that sleep at once; one on which it raises has failed."""

        def still_sleeps(replica: Replica) -> bool:  # else it has failed, and may be up again already
            return replica.client is not None and replica.client is self._sleepers.get(replica.name)

        sleepers = [replica for replica in self._fleet.replicas if still_sleeps(replica)]
        names = [replica.name for replica in sleepers]
        errors = await self._fleet.call(names, lambda name, client: what(client))
        for replica in sleepers:
            error = errors[replica.name]
            if isinstance(error, BaseException) and still_sleeps(replica):
                self._fleet.set_failed(replica.name, phase, error)

    async def _no_server_alone(self) -> None:
        """Return when every server that runs has a client: none is starting, none that failed is left."""

        def is_settled(replica: Replica) -> bool:
            is_out = replica.state is ReplicaState.DEAD and not replica.replacing
            return replica.client is not None or replica.name in self._waiting or is_out

        while not all(is_settled(replica) for replica in self._fleet.replicas):
            await asyncio.sleep(SETTLE_POLL_S)

    async def _wait_to_start(self, replica: Replica) -> None:
        self._waiting.add(replica.name)
        try:
            await self._may_start.wait()
        finally:
            self._waiting.discard(replica.name)
