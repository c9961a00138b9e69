"""vLLM servers as far as sleeping goes: HTTP, no model, and a note of every call in a wrong order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.publish import Publisher
from megatron_dapo.sync.sinks import Sink, SinkTable
from support.http_server import frame, stream

SHAPES = {"model.norm.weight": (4,)}
SINK = Sink("model.norm.weight", "model.norm.weight", (0,), (4,), 0, (1,))
TABLE = SinkTable((SINK,), {"model.norm.weight": "float32"}, {"model.norm.weight": (4,)})
PATHS = {
    "generate": "/megatron_dapo/v1/generate",
    "reset": "/reset_prefix_cache",
    "init": "/init_weight_transfer_engine",
    "tables": "/collective_rpc",
    "begin": "/start_weight_update",
    "send": "/update_weights",
    "commit": "/finish_weight_update",
    "sleep": "/sleep",
    "wake": "/wake_up",
}


class SleepyServer:
    """A Server of the fleet (start, poll, wait_healthy, stop, log_tail) that answers EngineClient's calls,
    those that come in a wrong order with 500.

    calls: of all starts. wrong: what was out of order. strikes: what happens, once, when a call comes: "die",
    "refuse" (500, as when memory is short) or "hang". may_start: whether the policy has left its devices.
    """

    def __init__(self, name: str) -> None:
        self.name, self.starts, self.is_slow = name, 0, False
        self.calls: list[str] = []
        self.wrong: list[str] = []
        self.strikes: dict[str, str] = {}
        self.may_start: Callable[[], bool] = lambda: True
        self._runner: web.AppRunner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._code: int | None = 0
        self.weights = self.cache = "none"

    # --- a Server

    def start(self) -> None:
        if not self.may_start():
            self.wrong.append("it starts while the policy has the devices")
        self.starts, self._code = self.starts + 1, None
        # weights: none, room (memory without values), begun, or whole; cache: none or there
        self.weights, self.cache, self.running = "whole", "there", 0
        self.calls.append("start")

    async def wait_healthy(self, timeout: float) -> None:
        while self.is_slow:
            await asyncio.sleep(0.005)
        app = web.Application()
        app.router.add_get("/health", self._health)
        for name, path in PATHS.items():
            app.router.add_post(path, lambda request, name=name: self._call(name, request))
        self._loop = asyncio.get_running_loop()
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    @property
    def url(self) -> str:
        assert self._runner is not None
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def poll(self) -> int | None:
        return self._code

    def stop(self) -> None:
        self.weights = self.cache = "none"
        self._code = self._code or 0
        runner, self._runner = self._runner, None
        if runner is not None:
            assert self._loop is not None
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(5)

    def log_tail(self) -> str:
        return "  | torch.OutOfMemoryError: CUDA out of memory"

    @property
    def holds_memory(self) -> bool:
        return self.weights != "none" or self.cache != "none"

    # --- its API

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self._code else 200)

    async def _call(self, name: str, request: web.Request) -> web.StreamResponse:
        if self._code is not None:  # it is dead; a call that was under way gets no answer
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        if name == "wake":
            name = f"wake {request.query['tags']}"
        if name != "reset" and self.calls[-1] != name:  # chunks and requests come in any number
            self.calls.append(name)
        if strike := self.strikes.pop(name, None):
            return await self._strike(strike, request)
        if problem := self._problem(name):
            self.wrong.append(f"{name}: {problem}")
            return web.json_response({"error": problem}, status=500)
        return await self._obey(name, request)

    async def _strike(self, kind: str, request: web.Request) -> web.Response:
        if kind == "die":
            self.weights = self.cache = "none"
            self._code = 1
            assert request.transport is not None
            request.transport.abort()
        if kind == "hang":
            await asyncio.Event().wait()
        return web.json_response({"error": "CUDA out of memory"}, status=500)

    def _problem(self, name: str) -> str:
        """Why vLLM could not do it, or would compute nonsense; '' when all is well."""
        awake = self.weights == "whole" and self.cache == "there"
        asleep = self.weights == self.cache == "none"
        needed = {
            "generate": (awake, "it has no weights, or no cache"),
            "reset": (awake, "it sleeps"),
            "sleep": (awake and not self.running, "it is not idle"),
            "wake weights": (asleep, "they do not sleep"),
            "begin": (self.weights in ("room", "whole"), "there is no room, or an update is active"),
            "send": (self.weights == "begun", "no update was begun"),
            "commit": (self.weights == "begun", "no update was begun"),
            "wake kv_cache": (
                self.weights == "whole" and self.cache == "none",
                "it does not sleep, or there are no weights",
            ),
        }
        holds, problem = needed.get(name, (True, ""))
        return "" if holds else problem

    async def _obey(self, name: str, request: web.Request) -> web.StreamResponse:
        if name == "generate":
            n = (await request.json())["n"]
            self.running += n
            await asyncio.sleep(0.002)
            self.running -= n
            return await stream(request, [frame(index=index) for index in range(n)])
        match name:
            case "sleep":
                self.weights = self.cache = "none"
            case "wake weights":
                self.weights = "room"
            case "wake kv_cache":
                self.cache = "there"
            case "begin":
                self.weights = "begun"
            case "commit":
                self.weights = "whole"
        answers: dict[str, Any] = {
            "reset": {"success": True},
            "tables": {"results": [TABLE.to_json()]},
            "wake weights": {"status": "sleeping"},
            "wake kv_cache": {"status": "awake"},
        }
        return web.json_response(answers.get(name, {}))


class Transport:
    """Two rounds of nothing, to every engine."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.lost: Mapping[str, str] = {}

    def set_workers(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)

    def rounds(
        self, weights: Any, version: int, *, engines: Collection[str], verify: bool
    ) -> Iterator[Mapping[str, list[Manifest]]]:
        manifest = Manifest(
            version=version,
            table=TABLE.digest,
            path="/memory",
            offset=0,
            num_bytes=0,
            dtype_whole="float32",
            pieces=(),
        )
        for _ in range(2):
            yield {w.engine: [manifest] for w in self.workers if w.engine in engines}


def make_publisher() -> Publisher:
    return Publisher(Transport(), lambda value: value, shapes=SHAPES, dtype="float32")


def check_ended(servers: Sequence[SleepyServer]) -> None:
    assert [server.wrong for server in servers] == [[]] * len(servers)
    assert all(server.poll() is not None for server in servers), "a server was left running"
