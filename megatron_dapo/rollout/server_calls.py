"""Calls about a whole vLLM server: its health, its memory, its weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_dapo.errors import UserError
from megatron_dapo.rollout.connection import Connection
from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.rollout.progress import ServerLoad, parse_load

PROBE_TIMEOUT_S = 10.0  # of /health and /metrics


class ServerCalls:
    """The part of EngineClient that asks for no tokens, with the same errors. Calls of a weight push and of
    sleeping raise TimeoutError after `progress_timeout_s`.
    """

    def __init__(self, url: str, token: str, *, progress_timeout_s: float) -> None:
        self.url = url
        self._connection = Connection(url, token)
        self._progress_timeout_s = progress_timeout_s

    async def health(self) -> bool:
        """True if the server says within PROBE_TIMEOUT_S that its engine works. EngineDied if it is gone."""
        try:
            await self._connection.call("GET", "/health", timeout_s=PROBE_TIMEOUT_S)
        except (RequestFailed, TimeoutError):
            return False
        return True

    async def load(self, timeout_s: float = PROBE_TIMEOUT_S) -> ServerLoad:
        """What the server counts about itself. UserError if its statistics are switched off."""
        text = await self._connection.call("GET", "/metrics", timeout_s=timeout_s)
        load = parse_load(text)
        if load is None:
            raise UserError(
                f"{self.url}/metrics counts no generated tokens, so a hung engine looks like a busy one; "
                "take --disable-log-stats out of rollout.extra_args"
            )
        return load

    async def wait_idle(self, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """Return when the server runs no request any more. One that was cancelled here ends there a moment
        later.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.002
        while True:
            try:
                return await self.reset_prefix_cache()
            except RequestFailed:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. RequestFailed while requests run, for then vLLM keeps the cache."""
        answer = await self._connection.call("POST", "/reset_prefix_cache")
        if not answer["success"]:
            raise RequestFailed(
                f"{self.url} kept its prefix cache because requests are running; pause or finish them first",
                "busy",
            )

    # --- weights

    async def init_weight_transfer(self, info: dict[str, Any] | None = None) -> None:
        """Prepare the server for weight pushes; once after its start."""
        await self._connection.call("POST", "/init_weight_transfer_engine", {"init_info": info or {}})

    async def sink_tables(self, shapes: Mapping[str, Sequence[int]], dtype: str) -> list[Any]:
        """What each worker needs of a checkpoint of these tensors (sync/sinks.py: SinkTable.to_json)."""
        kwargs = {"shapes": {name: list(shape) for name, shape in shapes.items()}, "dtype": dtype}
        body = {"method": "megatron_dapo_sink_table", "kwargs": kwargs}
        return (await self._connection.call("POST", "/collective_rpc", body))["results"]

    async def start_weight_update(self) -> None:
        """Begin a push. What the server held until now is lost with the first chunk."""
        await self._timed_call("/start_weight_update")

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        """Hand over a chunk for each worker (sync/manifest.py); when this returns nobody reads the memory."""
        await self._timed_call("/update_weights", {"update_info": info})

    async def finish_weight_update(self, version: str) -> None:
        """Make the update current. RequestFailed naming every parameter that was not loaded in full."""
        await self._timed_call("/finish_weight_update", {"weight_version": version})

    async def weight_version(self) -> str:
        """The version of the last finished update; 'default' before the first."""
        return (await self._connection.call("GET", "/weight_info"))["weight_version"]

    # --- memory (sleeping.py)

    async def sleep(self) -> None:
        """Give the devices' memory back, weights and cache with it; requests that run are aborted, and later
        ones wait until both are woken.
        """
        await self._timed_call("/sleep?level=2&mode=abort")

    async def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory for the weights, whose values are undefined then, or for the cache; weights first.
        RequestFailed when that does not sleep: vLLM passes over it in silence.
        """
        answer = await self._timed_call(f"/wake_up?tags={what}")
        expected = "sleeping" if what == "weights" else "awake"
        if answer["status"] != expected:
            raise RequestFailed(
                f"{self.url} is {answer['status']}, not {expected}, after its {what} were woken", "asleep"
            )

    async def _timed_call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """`progress_timeout_s` is plenty for a chunk, and for the repacking at the end."""
        return await self._connection.call("POST", path, body, timeout_s=self._progress_timeout_s)
