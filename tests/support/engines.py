"""Engines without processes: a fake server and a fake client for each, for the fleet and the service. Time is
counted in ticks of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.client import EngineDied, RequestFailed
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.types import Completion
from support.samples import make_completion


async def ticks(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


@dataclass
class FakeServer:
    """`bad_starts` starts fail before one succeeds; while `is_slow`, a start hangs."""

    name: str
    bad_starts: int = 0
    cannot_run: bool = False  # its model: it comes up, and dies of its first request
    is_slow_at_first_request: bool = False
    is_slow: bool = False
    starts: int = 0
    is_running: bool = False

    def start(self) -> None:
        assert not self.is_running
        self.starts, self.is_running = self.starts + 1, True

    async def wait_healthy(self, timeout: float) -> None:
        await asyncio.sleep(0)
        while self.is_slow:
            await asyncio.sleep(0.001)
        if self.starts <= self.bad_starts:
            raise EngineDied(f"{self.name} ended with exit code 1\n  | OSError: no such model")

    def poll(self) -> int | None:
        return None if self.is_running else 1

    def stop(self) -> None:
        self.is_running = False

    def log_tail(self) -> str:
        return f"  | RuntimeError: root cause in the log of {self.name}"


@dataclass
class FakeClient:
    """Answers after `delay(prompt)` ticks; `failures[prompt]` are raised first, in their order.

    A prompt is its first token. Prompts in `held` never end by themselves. As on a real server, a request
    that was cancelled goes on for a few ticks, and the prefix cache cannot be reset meanwhile.
    """

    server: FakeServer
    failures: dict[int, list[BaseException]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    delay: Callable[[int], int] = lambda prompt: 1
    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    seeds: dict[int, int | None] = field(default_factory=dict)
    running: int = 0  # sequences
    most_running: int = 0
    resets: int = 0
    is_healthy: bool = True
    is_closed: bool = False
    on_server: int | None = None

    async def generate(
        self, prompt_tokens: Sequence[int], *, n: int, weight_version: int, seed: int | None, **options: Any
    ) -> list[Completion]:
        prompt = prompt_tokens[0]
        self.started.append(prompt)
        self.seeds[prompt] = seed
        self.running += n
        self.most_running = max(self.most_running, self.running)
        try:
            await ticks(self.delay(prompt))
            while prompt in self.held and not self.is_closed:
                await asyncio.sleep(0)
            if self.is_closed:
                raise EngineDied(f"the client of {self.server.name} was closed")
            if self.failures.get(prompt):
                error = self.failures[prompt].pop(0)
                if isinstance(error, EngineDied):
                    self.server.is_running = False
                raise error
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(0.002, self._end, n)
            raise
        except BaseException:
            self._end(n)
            raise
        self._end(n)
        self.finished.append(prompt)
        return [make_completion((5,), version=weight_version, number=i) for i in range(n)]

    def _end(self, n: int) -> None:
        self.running -= n

    def sequences_on_server(self) -> int | None:
        return self.on_server

    async def health(self) -> bool:
        return self.is_healthy

    async def warm_up(self, timeout_s: float) -> None:
        while self.server.is_slow_at_first_request:
            await asyncio.sleep(0.001)
        if self.server.cannot_run:
            self.server.is_running = False
            raise EngineDied("EngineCore encountered an issue. See stack trace (above) for the root cause.")

    async def init_weight_transfer(self) -> None:
        pass

    async def reset_prefix_cache(self) -> None:
        if self.running:
            raise RequestFailed("kept its prefix cache because requests are running", "busy")
        self.resets += 1

    async def wait_idle(self) -> None:
        for _ in range(20):
            if not self.running:
                return
            await asyncio.sleep(0.001)
        await self.reset_prefix_cache()  # raises

    async def start_weight_update(self) -> None:
        await asyncio.sleep(0)

    async def update_weights(self, info: dict[str, Any]) -> None:
        await asyncio.sleep(0)

    async def finish_weight_update(self, version: str) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class Engines:
    """A fleet of fakes. `clients[name]` are the clients of an engine's starts, `now` is the time."""

    num: int = 1
    now: float = 0.0
    rollout: dict[str, Any] = field(default_factory=dict)
    servers: list[FakeServer] = field(default_factory=list)
    clients: dict[str, list[FakeClient]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    prepare: Callable[[FakeClient], None] = lambda client: None  # is called with every new client

    def __post_init__(self) -> None:
        self.servers = [FakeServer(f"engine_{i}") for i in range(self.num)]
        self.fleet = Fleet(
            RolloutConfig(engines=self.num, **self.rollout),
            [Replica(name=server.name, server=server) for server in self.servers],
            self._connect,
            message=self.messages.append,
            clock=lambda: self.now,
        )

    def _connect(self, server: FakeServer) -> FakeClient:
        client = FakeClient(server)
        self.prepare(client)
        self.clients.setdefault(server.name, []).append(client)
        return client

    def client(self, index: int) -> FakeClient:
        """The newest of an engine."""
        return self.clients[f"engine_{index}"][-1]

    @property
    def states(self) -> list[str]:
        return [str(replica.state) for replica in self.fleet.replicas]

    async def started(self, version: int | None = 0) -> Fleet:
        """The fleet when all have come up and, unless it is None, hold `version`."""
        await self.fleet.start()
        await self.fleet.wait_ready()
        if version is not None:
            self.push(version)
        return self.fleet

    def push(self, version: int) -> None:
        for replica in self.fleet.replicas:
            if replica.client is not None:
                self.fleet.set_ready(replica.name, version)

    async def until(self, holds: Callable[[], bool], timeout_s: float = 2.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds():
                await asyncio.sleep(0.001)
