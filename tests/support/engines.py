"""Engines without processes: a fake server and a fake client for each, for the fleet and the service. Time is
counted in ticks of the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.fleet import Fleet
from megatron_dapo.rollout.replica import Replica
from megatron_dapo.types import Completion, Partial, VersionRuns
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
class Response:
    """A response as it grows; every token is 5."""

    length: int
    versions: list[int]  # of each token
    known: int  # tokens that it began with

    @property
    def is_whole(self) -> bool:
        return len(self.versions) >= self.length

    @property
    def runs(self) -> VersionRuns:
        return tuple((version, len(list(run))) for version, run in itertools.groupby(self.versions))


@dataclass
class FakeClient:
    """Makes a token of every response each tick, `delay(prompt)` of them or `length(prompt, number)`;
    `failures[prompt]` are raised at the end, in their order.

    A prompt is its first token. Prompts in `held` never end by themselves. As on a real server, a request
    that was cancelled goes on for a few ticks, and the prefix cache cannot be reset meanwhile; while it is
    paused to keep its requests nothing grows.
    """

    server: FakeServer
    failures: dict[int, list[BaseException]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    delay: Callable[[int], int] = lambda prompt: 1
    length: Callable[[int, int], int] | None = None
    requests: dict[str, list[Response]] = field(default_factory=dict)
    version: int | None = None  # that a push has brought
    is_paused: bool = False
    pauses: list[str] = field(default_factory=list)
    tells_partials: bool = True
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
        self,
        prompt_tokens: Sequence[int],
        *,
        n: int,
        weight_version: int,
        seed: int | None,
        request_id: str | None = None,
        began: Sequence[Partial] = (),
        arrived: Callable[[Completion], None] = lambda completion: None,
        **options: Any,
    ) -> list[Completion]:
        prompt = prompt_tokens[0]
        lengths = [self.length(prompt, i) if self.length else self.delay(prompt) for i in range(n)]
        responses = [Response(max(length, 1), [], 0) for length in lengths]
        for response, partial in zip(responses, began, strict=bool(began)):
            response.versions = [version for version, number in partial.versions for _ in range(number)]
            response.known = len(response.versions)
        self.started.append(prompt)
        self.seeds[prompt] = seed
        self.running += n
        self.most_running = max(self.most_running, self.running)
        try:
            completions = await self._grow(
                prompt, responses, weight_version, arrived, request_id or f"unnamed-{prompt}"
            )
            while (prompt in self.held or self.is_paused) and not self.is_closed:
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
        return completions

    async def _grow(
        self,
        prompt: int,
        responses: list[Response],
        weight_version: int,
        arrived: Callable[[Completion], None],
        request_id: str,
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        self.requests[request_id] = responses
        try:
            while len(completions) < len(responses) and not self.is_closed:
                await asyncio.sleep(0)
                if self.is_paused:
                    continue
                version = weight_version if self.version is None else self.version
                for i, response in enumerate(responses):
                    if not response.is_whole and not (prompt in self.held and response.versions):
                        response.versions.append(version)
                    if response.is_whole and i not in completions:
                        size = len(response.versions)
                        completion = make_completion((5,) * size, versions=response.runs, number=i)
                        completions[i] = completion
                        arrived(completion)
        finally:
            del self.requests[request_id]
        return [completions[i] for i in sorted(completions)]

    async def partials(self) -> dict[str, tuple[Partial, ...]]:
        if not self.tells_partials:
            raise TimeoutError("it does not tell")
        return {
            name: tuple(
                Partial(
                    tokens=np.full(len(r.versions), 5, np.int32),
                    logprobs=np.full(len(r.versions), -1, np.float32),
                    versions=r.runs,
                    finish_reason="stop" if r.is_whole else None,
                )
                for r in responses
            )
            for name, responses in self.requests.items()
        }

    async def pause(self, mode: str = "wait") -> None:
        await asyncio.sleep(0)
        self.is_paused = True
        self.pauses.append(mode)

    async def resume(self) -> None:
        self.is_paused = False

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
                break
            await asyncio.sleep(0.001)
        await self.reset_prefix_cache()

    async def start_weight_update(self) -> None:
        await asyncio.sleep(0)

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        await asyncio.sleep(0)

    async def finish_weight_update(self, version: str) -> None:
        await asyncio.sleep(0)
        self.version = int(version)

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
