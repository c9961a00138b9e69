"""A simulated engine as the fleet sees it: the `Server` and the `Client` of rollout/replica.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_dapo.rollout.client import POLL_S, EngineDied
from megatron_dapo.rollout.simulate_engine import Engine
from megatron_dapo.types import Completion

Outcome = Callable[[int, int, int], tuple[list[int], list[bool]]]  # (position, version, n): lengths, verdicts


class SimulatedServer:
    """An engine's process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self) -> None:
        self.engine.start()

    def poll(self) -> int | None:
        return None if self.engine.is_up else 1

    async def wait_healthy(self, timeout: float) -> None:
        seconds = self.engine.profile.start_s
        if seconds > timeout:
            await asyncio.sleep(timeout)
            raise TimeoutError(
                f"simulated engine {self.engine.index} needs {seconds:g} s to start, "
                f"rollout.start_timeout_s={timeout:g} allows less"
            )
        await asyncio.sleep(seconds)

    def stop(self) -> None:
        self.engine.stop()

    def log_tail(self) -> str:
        return "  | (simulated)"


class SimulatedClient:
    """The controller's side. `lost` is called with (position, tokens, reason) for a request that
    ended before its time: aborted or failed.

    What it knows of the load is what the real client knows: the server's word, at most a second old, and
    what was sent since.
    """

    def __init__(
        self, engine: Engine, outcome: Outcome, lost: Callable[[int, int, str], None], longest: int
    ) -> None:
        self._engine, self._outcome, self._lost = engine, outcome, lost
        # Tokens say the verdict (1 right, 0 wrong); all responses are views of the same arrays.
        self._tokens = {right: np.full(longest, right, np.int32) for right in (False, True)}
        self._logprobs, self._trained = np.zeros(longest, np.float32), np.ones(longest, np.bool_)
        self._in_flight = self._sent = 0
        self._since, self._polls = 0.0, 0
        self._reported: tuple[int, int] | None = None
        self._is_closed = False

    async def generate(
        self, prompt_tokens: Sequence[int], *, n: int, max_tokens: int, weight_version: int, **options: Any
    ) -> list[Completion]:
        """As EngineClient.generate; the first prompt token is the position in the stream."""
        if not self._engine.is_up or self._is_closed:
            raise EngineDied(f"simulated engine {self._engine.index} is down")
        position, engine = prompt_tokens[0], self._engine
        with engine.meter:
            lengths, right = self._outcome(position, weight_version, n)
            self._poll()
        if not self._in_flight:
            self._since, self._polls = asyncio.get_running_loop().time(), 0
        self._in_flight, self._sent = self._in_flight + 1, self._sent + n
        request = engine.submit(len(prompt_tokens), lengths)
        try:
            await request.done
        except BaseException as error:
            reason = "aborted" if isinstance(error, asyncio.CancelledError) else "failed"
            self._lost(position, engine.drop(request), reason)
            raise
        finally:
            self._in_flight -= 1
        return [
            Completion(
                tokens=self._tokens[right[i]][:length],
                logprobs=self._logprobs[:length],
                trained=self._trained[:length],
                finish_reason="length" if length == max_tokens else "stop",
                versions=((weight_version, length),),
                number=i,
            )
            for i, length in enumerate(lengths)
        ]

    def sequences_on_server(self) -> int | None:
        self._poll()
        if self._reported is None:
            return None
        sequences, sent = self._reported
        return sequences + self._sent - sent

    def _poll(self) -> None:
        if self._in_flight:
            polls = int((asyncio.get_running_loop().time() - self._since) / POLL_S)
            if polls > self._polls:
                self._polls, self._reported = polls, (self._engine.sequences(), self._sent)

    async def health(self) -> bool:
        if not self._engine.is_up:
            raise EngineDied(f"simulated engine {self._engine.index} is down")
        return True

    async def warm_up(self, timeout_s: float) -> None:
        await self.health()

    async def init_weight_transfer(self) -> None: ...

    async def wait_idle(self) -> None: ...

    async def close(self) -> None:
        self._is_closed = True
        self._engine.end_requests(EngineDied("the client was closed"))
