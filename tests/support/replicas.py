"""Replicas without servers: they note what a weight push asks of them, and fail on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.sinks import SinkTable

HOST = "here"


class EngineDied(RuntimeError):
    """As the rollout wing says it."""


@dataclass
class Client:
    """Notes what it is asked; raises `error` when asked for `fails_at`. tables: of its workers."""

    fails_at: str = ""
    error: BaseException | None = None
    tables: Sequence[SinkTable] = ()
    calls: list[str] = field(default_factory=list)
    told: list[bool] = field(default_factory=list)  # of every chunk: whether it came with its pieces

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        self._note("tables")
        return [table.to_json() for table in self.tables]

    async def start_weight_update(self) -> None:
        self._note("start")

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        manifests = [Manifest.from_json(of_worker) for of_worker in info]
        self.told.append(all(manifest.pieces is not None for manifest in manifests))
        self._note(f"update {[manifest.num_bytes for manifest in manifests]} of {manifests[0].version}")

    async def finish_weight_update(self, version: str) -> None:
        self._note(f"finish {version}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.error is not None and call.split(" of ")[0] == self.fails_at:
            raise self.error


class Fleet:
    """The replicas as the rollout service shows them: a failed one is no target until it is restarted."""

    def __init__(self, **clients: Client) -> None:
        self.clients = clients
        self.ready: dict[str, int] = {}
        self.failed: list[tuple[str, str, BaseException]] = []
        self.targets = list(clients)

    def push_targets(self) -> list[str]:
        return list(self.targets)

    def where(self, name: str) -> tuple[str, int] | None:
        return (HOST, list(self.clients).index(name)) if name in self.clients else None

    def begin_call(
        self, names: Sequence[str], what: Callable[[str, Any], Awaitable[Any]]
    ) -> Callable[[], dict[str, Any]]:
        async def on_all() -> list[Any]:
            calls = (what(name, self.clients[name]) for name in names)
            return await asyncio.gather(*calls, return_exceptions=True)

        results = dict(zip(names, asyncio.run(on_all()), strict=True))
        return lambda: results

    def set_ready(self, name: str, version: int) -> None:
        self.ready[name] = version

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        self.failed.append((name, phase, error))
        self.targets.remove(name)
