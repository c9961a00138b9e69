"""A simulated engine as the fleet sees it: the `Server` and the `Client` of rollout/replica.py."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_dapo.errors import UserError
from megatron_dapo.rollout.errors import EngineDied, RequestFailed
from megatron_dapo.rollout.simulate_engine import Engine, Request, Response
from megatron_dapo.types import Completion, Partial, VersionRuns

Outcome = Callable[[int, int, int], tuple[list[int], list[bool]]]  # (position, version, n): lengths, verdicts
# Shares of a push's seconds: its beginning, its chunks, its end
BEGIN, SEND, COMMIT = 0.1, 0.8, 0.1
PUSH_CHUNKS = 4


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
        if self.engine.starts_fail:
            self.engine.starts_fail -= 1
            raise UserError(f"simulated engine {self.engine.index} ended while it started")

    def stop(self) -> None:
        self.engine.stop()

    def log_tail(self) -> str:
        return "  | (simulated)"


class SimulatedClient:
    """The controller's side. `lost` is called with (position, tokens, reason) for a request that
    ended before its time: aborted or failed.

    The outcome of a response is that of the weight version that it began with.
    """

    def __init__(
        self, engine: Engine, outcome: Outcome, lost: Callable[[int, int, str], None], longest: int
    ) -> None:
        self._engine, self._outcome, self._lost = engine, outcome, lost
        # Tokens say the verdict (1 right, 0 wrong); all responses are views of the same arrays.
        self._tokens = {right: np.full(longest, right, np.int32) for right in (False, True)}
        self._logprobs, self._trained = np.zeros(longest, np.float32), np.ones(longest, np.bool_)
        self._running: dict[str, tuple[Request, list[bool], int]] = {}  # by id: verdicts, longest allowed
        self._chance = random.Random(engine.index)  # of requests that fail
        self._sequences = 0  # asked for, that have not ended
        self._is_closed = False

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        weight_version: int,
        request_id: str | None = None,
        began: Sequence[Partial] = (),
        arrived: Callable[[Completion], None] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """As EngineClient.generate; the first prompt token is the position in the stream."""
        self._check()
        made: dict[int, Completion] = {}
        self._sequences += n
        try:
            if self._engine.profile.request_s:
                await asyncio.sleep(self._engine.profile.request_s)
                self._check()
            with self._engine.meter:
                first = min((v for partial in began for v, _ in partial.versions), default=weight_version)
                lengths, right = self._outcome(prompt_tokens[0], first, n)
            await self._sample(prompt_tokens, lengths, right, max_tokens, request_id, began, arrived, made)
            return [made[number] for number in range(n)]
        finally:
            self._sequences -= n - len(made)

    async def _sample(
        self,
        prompt_tokens: Sequence[int],
        lengths: list[int],
        right: list[bool],
        max_tokens: int,
        request_id: str | None,
        began: Sequence[Partial],
        arrived: Callable[[Completion], None] | None,
        made: dict[int, Completion],
    ) -> None:
        """Fill `made` with the completions by number."""
        engine, is_over, failure = self._engine, False, None
        if engine.failing and self._chance.random() < engine.failing:
            failure = RequestFailed(f"simulated engine {engine.index} failed a request", "server_error")

        def ended(sequence: Response) -> None:
            if failure is not None and not request.done.done():
                request.done.set_exception(failure)
            elif sequence.number not in made and not is_over:
                completion = self._completion(sequence, right[sequence.number], max_tokens)
                made[sequence.number] = completion
                self._sequences -= 1
                if arrived is not None:
                    arrived(completion)

        runs = [partial.versions for partial in began]
        request = engine.submit(len(prompt_tokens), lengths, began=runs, ended=ended)
        if request_id is not None:
            self._running[request_id] = request, right, max_tokens
        try:
            await request.done
            for sequence in request.sequences:  # those that had ended before they were sent
                ended(sequence)
        except BaseException as error:
            reason = "aborted" if isinstance(error, asyncio.CancelledError) else "failed"
            self._lost(prompt_tokens[0], engine.drop(request), reason)
            raise
        finally:
            is_over = True
            self._running.pop(request_id or "", None)

    async def partials(self) -> dict[str, tuple[Partial, ...]]:
        """The beginnings of all requests that run and have an id."""
        self._check()
        return {
            name: tuple(
                self._partial(sequence, verdict, longest)
                for sequence, verdict in zip(request.sequences, right, strict=True)
            )
            for name, (request, right, longest) in self._running.items()
        }

    def _completion(self, sequence: Response, right: bool, max_tokens: int) -> Completion:
        length = sequence.length
        return Completion(
            tokens=self._tokens[right][:length],
            logprobs=self._logprobs[:length],
            trained=self._trained[:length],
            finish_reason="length" if length == max_tokens else "stop",
            versions=sequence.runs,
            number=sequence.number,
        )

    def _partial(self, sequence: Response, right: bool, max_tokens: int) -> Partial:
        runs: VersionRuns = self._engine.runs(sequence)
        made = sum(count for _, count in runs)
        reason = "length" if sequence.length == max_tokens else "stop"
        return Partial(
            tokens=self._tokens[right][:made],
            logprobs=self._logprobs[:made],
            versions=runs,
            finish_reason=reason if sequence.is_over else None,
        )

    def sequences_on_server(self) -> int | None:
        return self._sequences

    async def health(self) -> bool:
        self._check()
        return True

    async def warm_up(self, timeout_s: float) -> None:
        self._check()
        if self._engine.warm_ups_fail:
            self._engine.warm_ups_fail -= 1
            self._engine.stop()
            raise EngineDied(f"simulated engine {self._engine.index} ran out of memory")

    async def init_weight_transfer(self) -> None: ...

    async def wait_idle(self) -> None: ...

    # --- a weight push

    async def pause(self, mode: str = "wait") -> None:
        self._check()
        self._engine.hold(paused=True)

    async def resume(self) -> None:
        self._check()
        self._engine.hold(paused=False)

    async def start_weight_update(self) -> None:
        await self._work(BEGIN)

    async def update_weights(self, info: list[dict[str, Any]]) -> None:
        await self._work(SEND / PUSH_CHUNKS)

    async def finish_weight_update(self, version: str) -> None:
        await self._work(COMMIT)
        self._engine.load_weights(int(version))

    async def _work(self, share: float) -> None:
        self._check()
        await asyncio.sleep(share * self._engine.profile.sync_s)
        self._check()

    async def close(self) -> None:
        self._is_closed = True
        self._engine.end_requests(EngineDied("the client was closed"))

    def _check(self) -> None:
        if not self._engine.is_up or self._is_closed:
            raise EngineDied(f"simulated engine {self._engine.index} is down")
