"""One vLLM server as the replicas of a weight push, without a rollout service."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.rollout.server import make_server
from megatron_dapo.sync.publish import Call
from megatron_dapo.sync.sinks import SinkTable

NAME, TOKEN = "engine 0", "bench"


class Client(EngineClient):
    """Notes what the workers need and receive."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(url, TOKEN, progress_timeout_s=timeout_s)
        self.tables: list[SinkTable] = []
        self.received = Counter[int]()  # bytes, by worker

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        answers = await super().sink_tables(shapes, dtype)
        self.tables = [SinkTable.from_json(answer) for answer in answers]
        return answers

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        self.received.update({worker: manifest["num_bytes"] for worker, manifest in enumerate(info)})
        await super().update_weights(info)

    async def on_workers(self, method: str, **kwargs: Any) -> list[Any]:
        """What a method of vLLM's worker, or of its extension, returns on each worker."""
        answer = await self._connection.call(
            "POST", "/collective_rpc", {"method": method, "kwargs": kwargs}, timeout_s=None
        )
        return answer["results"]


@contextmanager
def started(config: RunConfig, folder: Path) -> Iterator[OneServer]:
    """The server of `config` on the model in `folder`. Its client runs in an event loop in a thread of its
    own.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = make_server(config, 0, folder, TOKEN, digests="")
    server.start()
    try:
        _run(loop, server.wait_healthy(config.rollout.start_timeout_s))
        client = Client(server.url, config.rollout.progress_timeout_s)
        try:
            _run(loop, client.init_weight_transfer())
            yield OneServer(client, loop)
        finally:
            _run(loop, client.close())
    finally:
        server.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


class OneServer:
    """Replicas (sync/publish.py) of one."""

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self._loop = client, loop

    def on_workers(self, method: str, **kwargs: Any) -> list[Any]:
        return _run(self._loop, self.client.on_workers(method, **kwargs))

    # --- as publish.Replicas

    def push_targets(self) -> list[str]:
        return [NAME]

    def where(self, name: str) -> tuple[str, int]:
        return socket.gethostname(), 0

    def begin_call(self, names: Sequence[str], what: Call) -> Callable[[], dict[str, Any]]:
        async def call() -> Any:
            return await what(NAME, self.client)

        future = asyncio.run_coroutine_threadsafe(call(), self._loop)

        def answer() -> dict[str, Any]:
            return {NAME: future.exception() or future.result()}

        return answer

    def set_ready(self, name: str, version: int) -> None:
        pass

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        """There is nothing to measure without it, so the error ends the benchmark."""
        raise error


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, loop).result()
