"""All engines of a run as one: start, route requests, push weights, restart what died."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.bridge.vllm_plugin import DIGEST_VARIABLE
from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.engine import Engine, EngineDied
from megatron_dapo.rollout.launch import EngineServer
from megatron_dapo.types import Completion


class SyncMismatch(RuntimeError):
    """An engine does not hold the weights that were pushed to it."""


class Fleet:
    """The vLLM servers of this host and a client for each. Lives on the controller rank only."""

    def __init__(self, config: RunConfig, *, model: Path, max_model_len: int, stop_token_ids: Sequence[int]) -> None:
        self._rollout = config.rollout
        self._stop_token_ids = tuple(stop_token_ids)
        self._token = secrets.token_urlsafe(16)
        run_dir = Path(config.run.dir).resolve()
        self._digests = run_dir / "digests"

        def server(index: int, folder: Path, digests: str) -> EngineServer:
            extra = {DIGEST_VARIABLE: str(self._digests / digests)} if config.run.verify_sync else None
            return EngineServer(
                index,
                str(folder),
                config.rollout,
                config.model.dtype,
                max_model_len,
                run_dir,
                self._token,
                config.run.seed,
                extra,
            )

        self.servers = [server(index, model, f"engine_{index}") for index in range(config.rollout.engines)]
        self._fresh_server = lambda folder: server(len(self.servers), folder, "fresh")
        self._engines: list[Engine | None] = [None] * len(self.servers)
        self._broken: set[int] = set()
        self._load = [0] * len(self.servers)
        self._restarts_left = config.rollout.max_restarts

    def start(self) -> None:
        """Start every server; they are ready after `connect`. ValueError for a port in use."""
        for server in self.servers:
            server.start()

    async def connect(self) -> None:
        """Wait until every server is healthy and open its client. EngineDied quotes the log of one that does not come up."""
        await asyncio.gather(*(server.wait_healthy(self._rollout.start_timeout_s) for server in self.servers))
        for index, server in enumerate(self.servers):
            if self._engines[index] is None:
                engine = self._engines[index] = Engine(server.url, self._token, self._rollout.request_timeout_s)
                await engine.init_weight_transfer()

    async def generate(
        self, prompt_tokens: Sequence[int], *, n: int, temperature: float, top_p: float, seed: int | None, weight_version: int
    ) -> list[Completion]:
        """`n` completions of one prompt from the least loaded engine. EngineDied when that engine is gone."""
        index = min(range(len(self._load)), key=self._load.__getitem__)
        engine = self._engines[index]
        assert engine is not None, "connect() comes first"
        self._load[index] += n
        try:
            return await engine.generate(
                prompt_tokens,
                n=n,
                max_tokens=self._rollout.max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                weight_version=weight_version,
                stop_token_ids=self._stop_token_ids,
            )
        except (EngineDied, TimeoutError):  # restarted, so that a server that only looks healthy cannot keep the run waiting
            self._broken.add(index)
            raise
        finally:
            self._load[index] -= n

    async def on_all(self, call: Callable[[Engine], Awaitable[Any]]) -> None:
        """Make one call on every engine at once. EngineDied when one is gone; `restart_dead` replaces it."""
        results = await asyncio.gather(*(call(engine) for engine in self._engines if engine), return_exceptions=True)
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self._broken.add(index)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def restart_dead(self) -> list[int]:
        """Restart every engine that died or failed; until the next push its weights are those of the model folder.

        EngineDied when rollout.max_restarts is used up.
        """
        dead = [index for index in range(len(self.servers)) if index in self._broken or not await self._works(index)]
        for index in dead:
            server = self.servers[index]
            if self._restarts_left == 0:
                raise EngineDied(
                    f"engine {index} died and rollout.max_restarts={self._rollout.max_restarts} is used up.\n{server.log_tail()}"
                )
            self._restarts_left -= 1
            await self._disconnect(index)
            await asyncio.to_thread(server.stop)
            server.start()
        self._broken.clear()
        await self.connect()
        return dead

    async def verify(self, export: Path, version: int) -> int:
        """Compare every parameter in every engine, by SHA-256 taken as loaded, with a fresh server on the exported checkpoint.

        Needs run.verify_sync. Returns the number of parameters compared; SyncMismatch names those that differ.
        """
        fresh = self._fresh_server(export)
        fresh.start()
        try:
            await fresh.wait_healthy(self._rollout.start_timeout_s)
        finally:
            await asyncio.to_thread(fresh.stop)
        compared = 0
        for rank in range(self._rollout.tensor_parallel):
            expected = json.loads((self._digests / "fresh" / f"tp{rank}-load.json").read_text())
            for index in range(len(self.servers)):
                held = json.loads((self._digests / f"engine_{index}" / f"tp{rank}-v{version}.json").read_text())
                wrong = sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
                if wrong:
                    raise SyncMismatch(
                        f"after weight push {version}, engine {index} (tensor-parallel rank {rank}) differs from {export} in "
                        f"{len(wrong)} of {len(expected)} parameters: {', '.join(wrong[:10])}"
                    )
                compared += len(expected)
        return compared

    async def close(self) -> None:
        """Close the clients and stop the servers."""
        for index in range(len(self._engines)):
            await self._disconnect(index)
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self.servers))

    async def _works(self, index: int) -> bool:
        engine = self._engines[index]
        try:
            return self.servers[index].poll() is None and engine is not None and await engine.health()
        except EngineDied:
            return False

    async def _disconnect(self, index: int) -> None:
        engine, self._engines[index] = self._engines[index], None
        if engine is not None:
            await engine.close()
