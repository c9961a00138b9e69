"""Engines of other hosts than rank 0's, through torchrun's store.

Rank 0 never starts a process elsewhere. Its RemoteServer writes down that an engine is to run; an EngineHost,
a thread of the first rank of that host (or of serve.py where there is no rank), reads it, starts or stops the
server as its own child, and writes back how it is. What the store says of engine N (under megatron_dapo/):

    engine/N/wanted     {"start": number of this start, "runs": whether it shall, "token": the run's}
    engine/N/found      {"start": as above, "url", "code": null or the exit code, "log": its last words}
    engine_host/HOST    counts up while the EngineHost lives
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.lifeline import Clocks
from megatron_dapo.rendezvous import Store, address_towards
from megatron_dapo.rollout.replica import Server
from megatron_dapo.rollout.server import EngineStartTimeout, make_server, until_healthy

POLL_S = 0.2
LOG_S = 5.0  # how old the quoted log of an engine that runs may be
SILENT_S = 30.0  # without a sign of life a host counts as gone; longer than it takes to stop an engine
# The same for a rank's process, in which one call may hold the interpreter: what else there can be, the
# lifeline of the ranks notices.
SILENT_RANK_S = Clocks().held_s + SILENT_S


class SignsOfLife:
    """Whether something still counts up a `key` of the store, at the latest after silent_s. `clock` counts
    seconds.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        silent_s: float = SILENT_S,
    ) -> None:
        self._store, self._key, self._clock, self.silent_s = store, key, clock, silent_s
        self._count, self._heard_at = 0, clock()

    def are_missing(self) -> bool:
        """Whether there were some, and none within silent_s; time in which nobody asked does not count."""
        count = self._store.add(self._key, 0)
        if count != self._count:
            self._count, self._heard_at = count, self._clock()
        return count > 0 and self._clock() - self._heard_at > self.silent_s

    async def another(self) -> bool:
        """Return at the next one, or False when they are missing."""
        count = self._store.add(self._key, 0)
        while self._store.add(self._key, 0) == count:
            if self.are_missing():
                return False
            await asyncio.sleep(POLL_S)
        return True


class ChildServer(Server, Protocol):
    """A server of this host (EngineServer, or a fake)."""

    @property
    def url(self) -> str: ...


class EngineHost:
    """Starts, stops and watches the `engines` (their numbers) of `host`, this one, as rank 0 wants it, in a
    thread that begins at once. `make(number, token)` makes a server. `clock` counts seconds.

    When the thread ends, with its process at the latest, so do its engines. A server that cannot be started
    counts as ended, with the error as its last words.
    """

    def __init__(
        self,
        store: Store,
        host: str,
        engines: Iterable[int],
        make: Callable[[int, str], ChildServer],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._host = store, host
        self._engines = [_Engine(store, index, make, clock) for index in engines]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engines of this host", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Stop the engines that still run. May be called twice."""
        self._closing.set()
        self._thread.join()
        atexit.unregister(self.close)

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store has ended; so will the run
            while not self._closing.wait(POLL_S):
                for engine in self._engines:
                    self._store.add(alive_key(self._host), 1)  # often: to stop an engine takes seconds
                    engine.look()
        for engine in self._engines:
            engine.stop()


class _Engine:
    """One engine on its own host."""

    def __init__(
        self,
        store: Store,
        index: int,
        make: Callable[[int, str], ChildServer],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._index, self._make, self._clock = store, index, make, clock
        self._start = 0  # the number of the start that was obeyed last
        self._server: ChildServer | None = None
        self._found: dict[str, Any] = {}  # as it was written
        self._log_read_at = 0.0

    def look(self) -> None:
        """Do what is wanted, and write down what has changed."""
        wanted = _read(self._store, _wanted(self._index))
        if wanted["start"] > self._start:
            self.stop()
            self._start = wanted["start"]
            self._begin(wanted["token"]) if wanted["runs"] else self._write(url="", code=0, log="")
        elif self._server and not wanted["runs"]:
            self.stop()
            self._write(code=0)
        elif self._server:
            self._watch(self._server)

    def stop(self) -> None:
        if self._server:
            self._server.stop()
            self._server = None

    def _begin(self, token: str) -> None:
        server = self._make(self._index, token)
        try:
            server.start()
        except (UserError, OSError) as error:
            return self._write(url="", code=1, log=f"  | {error}")
        self._server, self._log_read_at = server, self._clock()
        self._write(url=server.url, code=None, log=server.log_tail())

    def _watch(self, server: ChildServer) -> None:
        if self._found["code"] is not None:
            return
        code = server.poll()
        if code is not None or self._clock() - self._log_read_at >= LOG_S:
            self._log_read_at = self._clock()
            self._write(code=code, log=server.log_tail())

    def _write(self, **changes: Any) -> None:
        found = {**self._found, "start": self._start, **changes}
        if found != self._found:
            self._found = found
            self._store.set(_found(self._index), json.dumps(found))


class RemoteServer:
    """Rank 0's side of engine `index` on `host`: a Server as the fleet has them. signs_of_life: that of the
    host; of a rank there, by default.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        host: str,
        token: str,
        *,
        signs_of_life: SignsOfLife | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index, self.host = index, host
        self._store, self._token, self._clock = store, token, clock
        self._start = 0
        self._signs_of_life = signs_of_life or SignsOfLife(
            store, alive_key(host), clock, silent_s=SILENT_RANK_S
        )

    @property
    def url(self) -> str:
        """ValueError as long as its host has not started it."""
        if not (url := self._state().get("url")):
            raise ValueError(f"engine {self.index} on {self.host} has no address: it is not started there")
        return url

    def start(self) -> None:
        """Have it started; a server of an earlier start is stopped before."""
        self._start = self._store.add(f"megatron_dapo/engine/{self.index}/starts", 1)
        self._want(runs=True)

    def poll(self) -> int | None:
        """None while the server runs or its host is about to start it, else its exit code; 0 when it was
        stopped or never started, 1 when its host is gone.
        """
        if not self._start:
            return 0
        if (code := self._state().get("code")) is not None:
            return code
        return 1 if self._signs_of_life.are_missing() else None

    async def wait_healthy(self, timeout: float) -> None:
        """Return when /health answers 200. EngineDied or EngineStartTimeout, both with the end of the log."""
        began = self._clock()
        while not self._state() and self.poll() is None:
            if self._clock() - began > timeout:
                raise EngineStartTimeout(
                    f"engine {self.index} was not started on {self.host} within {timeout:g} s; raise "
                    "rollout.start_timeout_s if the ranks there still build the policy"
                )
            await asyncio.sleep(POLL_S)
        await until_healthy(self, max(0.0, timeout - (self._clock() - began)))

    def stop(self) -> None:
        """Have the server stopped, and wait for it as long as its host lives, but at most SILENT_S."""
        began = self._clock()
        with suppress(RuntimeError):  # the store has ended, and the ranks with it
            if self._start:
                self._want(runs=False)
            while self.poll() is None and self._clock() - began < SILENT_S:
                time.sleep(POLL_S)

    def log_tail(self) -> str:
        """What the server's log says about an end, as its host has read it."""
        if self._signs_of_life.are_missing():
            return f"  | {self.host} has given no sign of life for {self._signs_of_life.silent_s:g} s"
        return self._state().get("log", f"  | {self.host} has not started it")

    def _want(self, *, runs: bool) -> None:
        wanted = {"start": self._start, "runs": runs, "token": self._token}
        self._store.set(_wanted(self.index), json.dumps(wanted))

    def _state(self) -> dict[str, Any]:
        """What its host says of this start; empty as long as it says nothing."""
        found = _read(self._store, _found(self.index))
        return found if found["start"] == self._start else {}


def serve_engines(
    config: RunConfig, folder: Path, rank: int, host_of_rank: Sequence[str], store: Store
) -> EngineHost | None:
    """What this rank has to do for the engines of its host: with rollout.colocated something on the first
    rank of each host but rank 0's, whose engines are rank 0's children. Engines are numbered by host, in the
    order of the ranks.
    """
    host = host_of_rank[rank]
    if not config.rollout.colocated or host == host_of_rank[0] or host_of_rank.index(host) != rank:
        return None
    count = config.rollout.engines
    first = list(dict.fromkeys(host_of_rank)).index(host) * count
    address = address_towards(os.environ["MASTER_ADDR"])
    return run_engines(config, folder, store, host, range(first, first + count), address)


def run_engines(
    config: RunConfig, folder: Path, store: Store, host: str, numbers: range, address: str
) -> EngineHost:
    """The EngineHost of the engines with these numbers, on the model in `folder`; they listen on
    `address`.
    """

    def make(index: int, token: str) -> ChildServer:
        name, slot = f"engine_{index}", index - numbers.start
        return make_server(config, index, folder, token, digests=name, slot=slot, address=address)

    return EngineHost(store, host, numbers, make)


def _read(store: Store, key: str) -> dict[str, Any]:
    """What a key says; start 0 when it says nothing."""
    return json.loads(store.get(key)) if store.check([key]) else {"start": 0, "runs": False}


def _wanted(index: int) -> str:
    return f"megatron_dapo/engine/{index}/wanted"


def _found(index: int) -> str:
    return f"megatron_dapo/engine/{index}/found"


def alive_key(host: str) -> str:
    """That an EngineHost counts up."""
    return f"megatron_dapo/engine_host/{host}"
