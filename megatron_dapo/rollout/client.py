"""The asyncio client of one vLLM server: tokens in, tokens and log-probabilities out. What concerns the whole
server is in server_calls.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Literal

from megatron_dapo.config import RolloutConfig
from megatron_dapo.environment import REQUEST_PREFIX
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.answer import Responses, frames_of
from megatron_dapo.rollout.asked import Asked
from megatron_dapo.rollout.connection import CALL_TIMEOUT_S, JSON_PATH
from megatron_dapo.rollout.errors import EngineDied, EngineStalled, RequestFailed, RequestRefused
from megatron_dapo.rollout.progress import InFlight, ProgressClock
from megatron_dapo.rollout.server_calls import PROBE_TIMEOUT_S, ServerCalls
from megatron_dapo.rollout.wire import GENERATE_PATH, PARTIALS_PATH, PROGRESS_PATH, TokensFrame
from megatron_dapo.types import Completion, Partial

JSON_PREFIX = "generate-tokens-"  # of vLLM's names of requests that came over JSON_PATH
POLL_S = 1.0  # how often a server that has requests is looked at
OWN_FILES = (
    256  # open files of a policy rank without its connections: sockets of torch, logs, workers, libraries
)
PauseMode = Literal["abort", "wait", "keep"]

log = logging.getLogger(__name__)


def file_descriptors_needed(rollout: RolloutConfig, num_hosts: int = 1) -> int:
    """Open files that the controller's process may need: each sequence in flight can have a connection of its
    own.
    """
    return OWN_FILES + num_hosts * rollout.engines * (rollout.max_concurrency + 4)


class EngineClient(ServerCalls):
    """A client of the server at `url`, with its own connections. Use it inside one event loop; `await
    close()` at the end.

    Every call raises EngineDied when the server is gone, RequestRefused (4xx) or RequestFailed (5xx) with the
    server's words, TimeoutError when it does not answer, and UserError when this process may open no more
    files. `generate` has no limit on its total: it raises EngineStalled when the server makes no token for
    `progress_timeout_s`, a pause not counted.
    """

    def __init__(self, url: str, token: str, *, progress_timeout_s: float = 30.0) -> None:
        super().__init__(url, token, progress_timeout_s=progress_timeout_s)
        self._in_flight = InFlight()
        self._clock = ProgressClock(time.monotonic())
        self._watching: asyncio.Task[None] | None = None
        self._paused = False
        self._in_frames: bool | None = None  # whether the server has our own route; None: not asked yet
        self._running = 0  # sequences that were asked for in frames and have not arrived
        self._sent = 0  # sequences asked for so far
        # the server's last word about JSON requests: sequences in it, `_sent` at that time
        self._reported: tuple[int, int] | None = None
        self._named: dict[str, Responses] = {}  # of requests in flight, by request_id

    async def close(self) -> None:
        """Close the connections; requests in flight raise EngineDied."""
        self._in_flight.end(EngineDied(f"the client of {self.url} was closed"))
        if self._watching is not None:
            self._watching.cancel()
        await self._connection.close()

    # --- sampling

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
        weight_version: int,
        stop_token_ids: Sequence[int] = (),
        request_id: str | None = None,
        began: Sequence[Partial] = (),
        arrived: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample `n` completions of one prompt; cancelling the call aborts it on the server.

        `arrived` is called with each completion when it ends, before the others have. `began`: none, or n
        beginnings to go on from; one that has finished is returned as it is, and arrives at once.
        Sample i uses `seed + i` (vLLM's rule), so seeds of different prompts should be at least `n` apart;
        the rest of one that was begun uses another seed. A completion that ends by itself ends with its stop
        token, which has a log-probability like the others. `temperature` 0 is greedy and allows only n=1.
        `weight_version` is for tokens that the server names no version for, and its number keeps cached
        prefixes of other weights from being used. `request_id` is for `abort` and `partials`.
        """
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed} must not be negative; vLLM takes -1 for no seed")
        responses = Responses(
            n,
            began=began,
            max_tokens=max_tokens,
            seed=seed,
            weight_version=weight_version,
            url=self.url,
            arrived=arrived,
        )
        asked = Asked(
            prompt=list(prompt_tokens),
            numbers=responses.numbers,
            began=responses.beginnings,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_token_ids=list(stop_token_ids),
            cache_salt=str(weight_version),
            request_id=request_id,
        )
        if asked.numbers:
            await self._collect(asked, responses)
        return responses.whole()

    async def partials(self) -> dict[str, tuple[Partial, ...]]:
        """What the requests of this client that run on the server, and were sent with a request_id, have
        sampled so far: n beginnings each, with those that have finished. {} if the server cannot tell.
        """
        if self._in_frames is False:
            return {}
        found: dict[str, list[TokensFrame]] = {}
        try:
            async with aclosing(
                self._connection.frames("GET", PARTIALS_PATH, timeout_s=CALL_TIMEOUT_S)
            ) as frames:
                async for frame in frames:
                    found.setdefault(frame.request_id or "", []).append(frame)
        except RequestRefused as error:
            if error.status == 404:
                return {}
            raise
        # a request that was answered meanwhile is none that runs
        return {name: self._named[name].partials(found[name]) for name in found if name in self._named}

    def sequences_on_server(self) -> int | None:
        """Sequences of this client that run or wait on the server; None if it cannot be known yet.

        A server without our own route says how many there are once in a while; those sent since are added.
        """
        if self._in_frames is not False:
            return self._running
        if self._reported is None:
            return None
        sequences, sent = self._reported
        return sequences + self._sent - sent

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End requests by the id given to `generate`; their calls raise RequestFailed. Unknown ids are
        ignored.
        """
        names = [prefix + name for name in request_ids for prefix in (REQUEST_PREFIX, JSON_PREFIX)]
        if names:
            await self._connection.call("POST", "/inference/v1/abort_requests", {"request_ids": names})

    async def _collect(self, asked: Asked, responses: Responses) -> None:
        """Sample, while the server is watched; EngineStalled ends all requests that are in flight."""
        try:
            with self._in_flight.one():
                if len(self._in_flight) == 1:
                    self._clock = ProgressClock(time.monotonic())
                    self._watching = asyncio.create_task(self._watch())
                if asked.request_id is not None:
                    self._named[asked.request_id] = responses
                async with aclosing(self._sample(asked)) as frames:
                    async for frame in frames:
                        self._clock.answered(time.monotonic())
                        responses.add(frame)
        finally:
            if asked.request_id is not None and self._named.get(asked.request_id) is responses:
                del self._named[asked.request_id]
            if not self._in_flight and self._watching is not None:
                self._watching.cancel()

    async def _sample(self, asked: Asked) -> AsyncGenerator[TokensFrame, None]:
        """Each sequence when it ends, over our own route if the server has it."""
        if self._in_frames is not False:
            left = len(asked.numbers)
            self._running += left
            try:
                async with aclosing(self._connection.frames("POST", GENERATE_PATH, asked.body())) as frames:
                    async for frame in frames:
                        self._in_frames = True
                        left, self._running = left - 1, self._running - 1
                        yield frame
                return
            except RequestRefused as error:
                if error.status != 404 or self._in_frames:
                    raise
                if self._in_frames is None:
                    log.warning(
                        "%s has no %s, so its tokens come as JSON, which takes many times the processor "
                        "time; start it with --middleware megatron_dapo.rollout.middleware.RunToken",
                        self.url,
                        GENERATE_PATH,
                    )
                self._in_frames = False
            finally:
                self._running -= left
        async with aclosing(self._sample_json(asked)) as frames:
            async for frame in frames:
                yield frame

    async def _sample_json(self, asked: Asked) -> AsyncGenerator[TokensFrame, None]:
        """Over vLLM's own route: all sequences of a beginning at once."""
        self._sent += len(asked.numbers)
        parts = asked.apart()
        calls = [
            asyncio.create_task(self._connection.call("POST", JSON_PATH, part.json_body(), timeout_s=None))
            for part in parts
        ]
        try:
            index = 0
            for part, call in zip(parts, calls, strict=True):
                for frame in frames_of(await call, n=len(part.numbers), url=self.url):
                    yield dataclasses.replace(frame, index=index)
                    index += 1
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _watch(self) -> None:
        """Runs while requests are in flight: ends them if the server makes no token for too long.

        It is asked how far it is only if no response has arrived since the last look.
        """
        interval_s = min(POLL_S, self._progress_timeout_s / 5)
        while True:
            await asyncio.sleep(interval_s)
            is_quiet = self._clock.without_progress(time.monotonic()) >= interval_s
            if not self._paused and (is_quiet or self._in_frames is False):
                try:
                    await self._look(interval_s)
                except (UserError, EngineStalled) as error:
                    return self._in_flight.end(error)

    async def _look(self, interval_s: float) -> None:
        """Ask how far the server is. EngineStalled if it has stood still for too long."""
        left_s = self._progress_timeout_s - self._clock.without_progress(time.monotonic())
        timeout_s = min(PROBE_TIMEOUT_S, max(left_s, interval_s))
        sent, tokens = self._sent, None
        try:
            if self._in_frames is False:
                load = await self.load(timeout_s)
                tokens, self._reported = load.tokens, (load.sequences, sent)
            else:
                answer = await self._connection.call("GET", PROGRESS_PATH, timeout_s=timeout_s)
                tokens = answer["tokens"]
        except (RequestFailed, EngineDied, TimeoutError):
            pass  # no progress; a connection that breaks ends its request by itself
        except RequestRefused as error:
            if error.status != 404 or self._in_frames:
                raise
        now = time.monotonic()
        self._clock.observe(tokens, now)
        if self._paused or (seconds := self._clock.without_progress(now)) <= self._progress_timeout_s:
            return
        raise EngineStalled(
            f"{self.url} made no token in {seconds:.0f} s, with {len(self._in_flight)} requests in flight; "
            f"if it is only slow, raise rollout.progress_timeout_s={self._progress_timeout_s:g}"
        )

    # --- the server

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Stop generating: `wait` for running requests, `abort` them, or `keep` them as they are, with what
        they have computed. No progress is expected until `resume`.
        """
        self._paused = mode != "wait"  # while it waits for running requests they should get on
        clear = "false" if mode == "keep" else "true"
        try:
            await self._connection.call("POST", f"/pause?mode={mode}&clear_cache={clear}")
        except BaseException:
            self._paused = False
            raise
        self._paused = True

    async def resume(self) -> None:
        """Go on generating after a pause."""
        await self._connection.call("POST", "/resume")
        self._paused = False
        self._clock.answered(time.monotonic())

    async def warm_up(self, timeout_s: float) -> None:
        """Generate one token. A server's first request compiles and allocates, so it takes many times longer
        than others; and an engine that cannot run its model at all shows it here.
        """
        asked = Asked(
            prompt=[0],
            numbers=[0],
            began=[],
            max_tokens=1,
            temperature=1.0,
            top_p=1.0,
            seed=0,
            stop_token_ids=[],
            cache_salt="warm-up",
        )
        try:
            async with asyncio.timeout(timeout_s), aclosing(self._sample(asked)) as frames:
                async for _ in frames:
                    pass
        except TimeoutError as error:
            raise TimeoutError(f"{self.url} did not generate a first token within {timeout_s:g} s") from error
