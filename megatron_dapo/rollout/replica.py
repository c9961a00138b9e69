"""One engine as the controller sees it: a server process and the client that talks to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from megatron_dapo.types import Completion, Partial

HOUR_S = 3600.0
LAST_LOOKS, LOOK_S = 20, 0.1  # a server whose engine has died gets 2 s to write its last words into the log


class Server(Protocol):
    """A server process (EngineServer, or a fake)."""

    def start(self) -> None: ...
    def poll(self) -> int | None: ...
    async def wait_healthy(self, timeout: float) -> None: ...
    def stop(self) -> None: ...
    def log_tail(self) -> str: ...


class Client(Protocol):
    """What the fleet needs of a client (EngineClient, or a fake); a weight push calls more of it."""

    @property
    def generate(self) -> Callable[..., Awaitable[list[Completion]]]: ...
    def sequences_on_server(self) -> int | None: ...
    async def partials(self) -> Mapping[str, tuple[Partial, ...]]: ...
    async def pause(self, mode: Literal["abort", "wait", "keep"] = "wait") -> None: ...
    async def resume(self) -> None: ...
    async def health(self) -> bool: ...
    async def warm_up(self, timeout_s: float) -> None: ...
    async def init_weight_transfer(self) -> None: ...
    async def wait_idle(self) -> None: ...
    async def close(self) -> None: ...


class ReplicaState(StrEnum):
    STARTING = "starting"  # its server comes up
    READY = "ready"  # it holds the weights that may be sampled from, and takes requests
    STALE = "stale"  # it is up and holds other weights: those of the model folder, or an older version
    DRAINING = "draining"  # a push is due: it takes no request, and ends those it has or stands still
    DEAD = "dead"  # it failed, and is about to be replaced or left out


async def _lives() -> bool:
    """Of a host whose end ends the run."""
    return True


@dataclass(slots=True, eq=False)
class Replica:
    """A server, its client while the server is up, and how they are. Only the fleet changes it.

    version: the weight version it holds; None: those of the model folder. in_flight: sequences of its
    requests that are not answered. unsent: those of them that the router has just given to it and whose
    client was not called yet. error: how it failed last. was_started: its first start has ended, well or
    not. replacing: it is dead, and on its way to be started again. leaving: it gets no further request and is
    taken out. host, device: where its first worker is. host_lives: whether it may be started there again.
    """

    name: str
    server: Server
    client: Client | None = None
    state: ReplicaState = ReplicaState.DEAD
    version: int | None = None
    in_flight: int = 0
    unsent: int = 0
    error: str = ""
    was_started: bool = False
    replacing: bool = False
    leaving: bool = False
    host: str = ""
    device: int = 0
    host_lives: Callable[[], Awaitable[bool]] = _lives

    def load(self) -> int:
        """Sequences that it runs, as far as is known: a request is in flight until the longest of its
        sequences ends, and the server says how many really run.
        """
        on_server = self.client.sequences_on_server() if self.client is not None else None
        return self.in_flight if on_server is None else min(self.in_flight, on_server + self.unsent)


@dataclass(frozen=True, slots=True)
class Request:
    """A request in flight on a replica; `key` is what the caller knows it by."""

    key: int
    engine: str
    client: Client


class RestartBudget:
    """At most `per_hour` restarts within any hour, of all replicas together. `clock` counts seconds."""

    def __init__(self, per_hour: int, clock: Callable[[], float]) -> None:
        self._per_hour, self._clock = per_hour, clock
        self._granted_at: deque[float] = deque()

    def grant(self) -> bool:
        """Whether one more restart is allowed now; it then counts for an hour."""
        now = self._clock()
        while self._granted_at and now - self._granted_at[0] >= HOUR_S:
            self._granted_at.popleft()
        if len(self._granted_at) >= self._per_hour:
            return False
        self._granted_at.append(now)
        return True


async def last_words(replica: Replica, *, hung: bool) -> str:
    """What the log of a failed server says. One that is about to end is given time to write it."""
    for _ in range(0 if hung else LAST_LOOKS):
        if replica.server.poll() is not None:
            break
        await asyncio.sleep(LOOK_S)
    return f"\n{replica.server.log_tail()}"
