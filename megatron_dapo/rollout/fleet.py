"""All engines of a run as one: start, route requests, push weights, restart what died."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.rollout.engine import Engine, EngineDied
from megatron_dapo.rollout.launch import EngineServer
from megatron_dapo.types import Completion


class Fleet:
    """The vLLM servers of this host and a client for each. Lives on the controller rank only."""

    def __init__(self, config: RunConfig, *, model: Path, max_model_len: int, stop_token_ids: Sequence[int]) -> None:
        rollout = config.rollout
        self._rollout = rollout
        self._stop_token_ids = tuple(stop_token_ids)
        token = secrets.token_urlsafe(16)
        self.servers = [
            EngineServer(
                index=index,
                model=str(model),
                rollout=rollout,
                dtype=config.model.dtype,
                max_model_len=max_model_len,
                run_dir=Path(config.run.dir),
                token=token,
                seed=config.run.seed,
                extra_env=_digest_env(config, index),
            )
            for index in range(rollout.engines)
        ]
        self._token = token
        self._engines: list[Engine | None] = [None] * rollout.engines
        self._load = [0] * rollout.engines
        self._restarts_left = rollout.max_restarts

    def start(self) -> None:
        """Start every server; ready after `wait_healthy`. ValueError for a port in use."""
        for server in self.servers:
            server.start()

    async def wait_healthy(self) -> None:
        """Wait for every server and open its client. EngineDied quotes the log of one that does not come up."""
        await asyncio.gather(*(server.wait_healthy(self._rollout.start_timeout_s) for server in self.servers))
        for index, server in enumerate(self.servers):
            if self._engines[index] is None:
                engine = Engine(server.url, self._token, self._rollout.request_timeout_s)
                await engine.init_weight_transfer({})
                self._engines[index] = engine

    async def generate(
        self, prompt_tokens: Sequence[int], *, n: int, temperature: float, top_p: float, seed: int | None, weight_version: int
    ) -> list[Completion]:
        """`n` completions of one prompt from the least loaded engine. EngineDied when that engine is gone."""
        index = min(range(len(self._load)), key=self._load.__getitem__)
        engine = self._engines[index]
        if engine is None:
            raise EngineDied(f"engine {index} is not running")
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
        finally:
            self._load[index] -= n

    async def restart_dead(self) -> list[int]:
        """Restart every engine that died; their weights are those of the model folder until the next push.

        EngineDied with the log's end when rollout.max_restarts is used up.
        """
        dead = [i for i, server in enumerate(self.servers) if server.poll() is not None or not await self._healthy(i)]
        for index in dead:
            server = self.servers[index]
            if self._restarts_left == 0:
                raise EngineDied(
                    f"engine {index} died and rollout.max_restarts={self._rollout.max_restarts} is used up; see {server.log_path}"
                )
            self._restarts_left -= 1
            await self._close_client(index)
            server.stop()
            server.start()
        await self.wait_healthy()
        return dead

    async def push(self, step: Callable[[Engine], Awaitable[Any]]) -> None:
        """Run one weight-update call on every engine at once. EngineDied when one is gone."""
        await asyncio.gather(*(step(engine) for engine in self._engines if engine is not None))

    async def close(self) -> None:
        """Close the clients and stop the servers."""
        for index in range(len(self._engines)):
            await self._close_client(index)
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self.servers))

    async def _healthy(self, index: int) -> bool:
        engine = self._engines[index]
        try:
            return engine is not None and await engine.health()
        except (EngineDied, RuntimeError):
            return False

    async def _close_client(self, index: int) -> None:
        engine, self._engines[index] = self._engines[index], None
        if engine is not None:
            await engine.close()


def _digest_env(config: RunConfig, index: int) -> dict[str, str]:
    if not config.run.verify_sync:
        return {}
    return {"MEGATRON_DAPO_DIGEST_DIR": str((Path(config.run.dir) / "digests" / f"engine_{index}").resolve())}
