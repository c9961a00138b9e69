"""Replicas without servers: they note what a weight push asks of them, and fail on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dapo.sync.manifest import Manifest


class EngineDied(RuntimeError):
    """As the rollout wing says it."""


@dataclass
class Client:
    """Notes what it is asked; raises `error` when asked for `fails_at`."""

    fails_at: str = ""
    error: BaseException | None = None
    calls: list[str] = field(default_factory=list)

    async def start_weight_update(self) -> None:
        self._note("start")

    async def update_weights(self, info: dict[str, Any]) -> None:
        [entry] = Manifest.from_json(info).entries
        self._note(f"update {entry.name} of {info['version']}")

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

    def call(
        self, names: Sequence[str], what: Callable[[Any], Awaitable[None]]
    ) -> dict[str, BaseException | None]:
        async def on_all() -> list[Any]:
            calls = (what(self.clients[name]) for name in names)
            return await asyncio.gather(*calls, return_exceptions=True)

        return dict(zip(names, asyncio.run(on_all()), strict=True))

    def set_ready(self, name: str, version: int) -> None:
        self.ready[name] = version

    def set_failed(self, name: str, phase: str, error: BaseException) -> None:
        self.failed.append((name, phase, error))
        self.targets.remove(name)
