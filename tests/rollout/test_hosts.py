"""Engines of other hosts, by what both sides say through the store: fake servers, torch's store."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from aiohttp import web
from support.service import Grading, Stream

from megatron_dapo.config import RolloutConfig, RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout import hosts
from megatron_dapo.rollout.errors import EngineDied
from megatron_dapo.rollout.hosts import (
    SILENT_RANK_S,
    SILENT_S,
    EngineHost,
    RemoteServer,
    SignsOfLife,
    alive_key,
    serve_engines,
)
from megatron_dapo.rollout.server import EngineServer, EngineStartTimeout
from megatron_dapo.rollout.service import RolloutService

TOKEN = "secret"


class Fake:
    """A server that notes what it is told; `code` is how it ended."""

    def __init__(self, index: int, token: str, url: str = "http://10.0.0.2:8000") -> None:
        self.index, self.token, self.url = index, token, url
        self.code: int | None = None
        self.calls: list[str] = []
        self.error: Exception | None = None

    def start(self) -> None:
        self.calls.append("start")
        if self.error:
            raise self.error

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.calls.append("stop")

    def log_tail(self) -> str:
        return f"  | last words of start with {self.token}, code {self.code}"

    async def wait_healthy(self, timeout: float) -> None:
        raise AssertionError("rank 0 asks the server itself")


class Place:
    """A host with engines 2 and 3, and rank 0's side of them."""

    def __init__(self) -> None:
        self.store, self.now = dist.HashStore(), 0.0
        self.made: list[Fake] = []
        self.error: Exception | None = None
        self.url = "http://10.0.0.2:8000"
        self.servers = [
            RemoteServer(self.store, index, "host1", TOKEN, clock=lambda: self.now) for index in (2, 3)
        ]
        self.host: EngineHost | None = None

    def begin(self) -> None:
        self.host = EngineHost(self.store, "host1", (2, 3), self._make, clock=lambda: self.now)

    def _make(self, index: int, token: str) -> Fake:
        server = Fake(index, token, self.url)
        server.error = self.error
        self.made.append(server)
        return server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hosts, "POLL_S", 0.002)


@pytest.fixture
def place():
    place = Place()
    yield place
    if place.host:
        place.host.close()
    assert "engines of this host" not in {thread.name for thread in threading.enumerate()}


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def address(server: RemoteServer) -> str:
    try:
        return server.url
    except ValueError:
        return ""


def test_only_the_engine_that_is_wanted_starts_with_the_token_from_the_store(place):
    place.begin()
    first, second = place.servers
    assert (first.poll(), second.poll()) == (0, 0)
    second.start()
    assert second.poll() is None
    until(lambda: address(second))
    assert second.url == "http://10.0.0.2:8000"
    assert [(server.index, server.token, server.calls) for server in place.made] == [(3, TOKEN, ["start"])]
    assert (first.poll(), second.poll(), address(first)) == (0, None, "")


def test_a_dead_engine_says_how_it_ended_and_is_started_again(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    place.made[0].code = -9
    until(lambda: server.poll() is not None)
    assert server.poll() == -9
    assert server.log_tail() == "  | last words of start with secret, code -9"
    server.stop()
    server.start()
    until(lambda: address(server))
    assert server.poll() is None and place.made[0].calls == ["start", "stop"]
    assert [made.calls for made in place.made[1:]] == [["start"]]


def test_stop_returns_when_the_engine_is_stopped(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    server.stop()
    assert place.made[0].calls == ["start", "stop"]
    assert server.poll() == 0


def test_a_start_that_was_taken_back_before_its_host_heard_of_it(place):
    server = place.servers[0]
    server.start()
    threading.Timer(0.05, place.begin).start()
    server.stop()
    assert (server.poll(), place.made) == (0, [])
    server.start()
    until(lambda: address(server))


def test_a_start_over_a_running_engine_stops_it_first(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    server.start()
    until(lambda: address(server))
    assert [made.calls for made in place.made] == [["start", "stop"], ["start"]]


def test_the_error_of_a_start_is_its_last_word(place):
    place.error = UserError("rollout.base_port=1: port 3 for engine 2 cannot be used")
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: server.poll() is not None)
    assert server.poll() == 1
    assert server.log_tail() == "  | rollout.base_port=1: port 3 for engine 2 cannot be used"
    with pytest.raises(EngineDied, match=r"engine 2 ended with exit code 1 .*\n.*rollout\.base_port=1"):
        asyncio.run(server.wait_healthy(5))


def test_the_log_of_an_engine_that_runs_is_read_now_and_then(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    place.made[0].token = "newer"
    time.sleep(0.05)
    assert server.log_tail() == "  | last words of start with secret, code None"
    place.now += hosts.LOG_S
    until(lambda: "newer" in server.log_tail())


def test_a_host_that_never_starts_its_engine(place):
    server = place.servers[0]
    server.start()

    async def wait() -> None:
        waiting = asyncio.create_task(server.wait_healthy(300))
        await asyncio.sleep(0.02)
        place.now = 301
        await waiting

    with pytest.raises(EngineStartTimeout, match=r"engine 2 .* on host1 within 300 s; raise rollout\.start"):
        asyncio.run(wait())
    assert server.poll() is None, "its ranks may still build the policy"


def test_a_host_without_a_sign_of_life_is_gone(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    assert server.poll() is None
    place.host.close()
    server.poll()  # hears the last sign
    place.now += SILENT_S + 0.1
    assert server.poll() is None, "one call may hold the interpreter of a rank"
    place.now += SILENT_RANK_S
    assert server.poll() == 1
    assert server.log_tail() == "  | host1 has given no sign of life for 330 s"
    server.stop()  # at once
    with pytest.raises(EngineDied, match="host1 has given no sign of life"):
        server.start()
        asyncio.run(server.wait_healthy(5))


async def test_another_sign_of_life_is_waited_for_until_its_host_is_gone(place):
    signs = SignsOfLife(place.store, alive_key("host1"), lambda: place.now)
    waiting = asyncio.create_task(signs.another())
    await asyncio.sleep(0.02)
    assert not waiting.done(), "there was none at all"
    place.store.add(alive_key("host1"), 1)
    assert await waiting
    waiting = asyncio.create_task(signs.another())
    await asyncio.sleep(0.02)
    place.now += SILENT_S + 0.1
    assert not await waiting


def test_time_in_which_nobody_asked_is_no_silence(place):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))
    place.now += 10 * SILENT_RANK_S
    until(lambda: place.made[0].calls)
    assert server.poll() is None


def test_closing_the_host_stops_what_runs(place):
    place.begin()
    for server in place.servers:
        server.start()
        until(lambda server=server: address(server))
    place.host.close()
    place.host.close()
    assert [made.calls for made in place.made] == [["start", "stop"], ["start", "stop"]]


def test_a_store_that_ends_ends_the_engines(place, monkeypatch):
    place.begin()
    server = place.servers[0]
    server.start()
    until(lambda: address(server))

    def gone(key: str) -> bytes:
        raise dist.DistNetworkError("connection closed")

    place.host._engines[0]._store = type(
        "Store", (), {"check": lambda self, keys: True, "get": staticmethod(gone)}
    )()
    until(lambda: place.made[0].calls == ["start", "stop"])


async def test_health_is_asked_of_the_engine_itself(place):
    answers = iter([503, 503, 200])
    app = web.Application()

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=next(answers))

    app.router.add_get("/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    place.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    place.begin()
    server = place.servers[0]
    server.start()
    await server.wait_healthy(10)
    assert next(answers, None) is None
    await runner.cleanup()


# --- which rank serves which engines ----------------------------------------------------


def config(tmp_path: Path, **rollout: object) -> RunConfig:
    return RunConfig.make({"model": {"path": "model"}, "run": {"dir": str(tmp_path)}, "rollout": rollout})


def test_the_first_rank_of_every_other_host_serves_its_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made = []
    monkeypatch.setattr(
        hosts, "EngineHost", lambda store, host, engines, make: made.append((host, engines)) or make
    )
    ranks = ["b", "b", "a", "a", "c"]
    found: list[Any] = [
        serve_engines(config(tmp_path, engines=2), tmp_path, rank, ranks, dist.HashStore())
        for rank in range(5)
    ]
    assert [make is None for make in found] == [True, True, False, True, False]
    assert made == [("a", range(2, 4)), ("c", range(4, 6))]
    apart = config(tmp_path, engines=2, colocated=False)
    assert serve_engines(apart, tmp_path, 2, ranks, dist.HashStore()) is None
    server = found[4](5, TOKEN)
    assert server.log_path == tmp_path / "logs" / "engine_5.log"
    assert server._slot == 1  # its GPUs are the second ones of its host


def test_engines_are_numbered_host_by_host(tmp_path):
    service = RolloutService(
        config(tmp_path, engines=2, tensor_parallel=4),
        folder=tmp_path,
        stop_token_ids=(1,),
        prompts=Stream(),
        grading=Grading(),
        hosts=["b", "a"],
        store=dist.HashStore(),
    )
    names = [replica.name for replica in service.fleet.replicas]
    assert names == ["engine_0", "engine_1", "engine_2", "engine_3"]
    assert [service.where(name) for name in names] == [("b", 0), ("b", 4), ("a", 0), ("a", 4)]
    servers = [replica.server for replica in service.fleet.replicas]
    assert [type(server).__name__ for server in servers] == ["EngineServer"] * 2 + ["RemoteServer"] * 2
    assert [server.index for server in servers] == [0, 1, 2, 3]
    service.close()


def test_the_token_stands_in_the_store_alone(place):
    place.servers[0].start()
    wanted = json.loads(place.store.get("megatron_dapo/engine/2/wanted"))
    assert wanted == {"start": 1, "runs": True, "token": TOKEN}


def test_an_engine_listens_on_the_address_it_is_given(tmp_path):
    def server(address: str) -> EngineServer:
        rollout = RolloutConfig()
        return EngineServer(
            0, "model", rollout, "fp32", 128, tmp_path, TOKEN, 0, device="cpu", address=address
        )

    arguments = server("127.0.0.1").arguments(8000)
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    other = server("::1")
    assert other.arguments(8000)[arguments.index("--host") + 1] == "::1"
    other._port = 8000
    assert other.url == "http://[::1]:8000"


IGNORED = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from pathlib import Path
from megatron_dapo.config import RolloutConfig
from megatron_dapo.rollout.server import EngineServer
class Sleeper(EngineServer):
    def arguments(self, port):
        return ["-c", "import time; print('up', flush=True); time.sleep(60)"]
server = Sleeper(0, "model", RolloutConfig(), "fp32", 128, Path(sys.argv[1]), "token", 0, device="cpu")
server.start()
import time
while "up" not in server.log_path.read_text():
    time.sleep(0.01)
began = time.monotonic()
server.stop()
print(time.monotonic() - began)
"""


def test_a_rank_that_ignores_signals_has_engines_that_do_not(tmp_path):
    found = subprocess.run([sys.executable, "-c", IGNORED, str(tmp_path)], capture_output=True, text=True)
    assert float(found.stdout) < 5, found.stderr  # not the grace that SIGKILL comes after
