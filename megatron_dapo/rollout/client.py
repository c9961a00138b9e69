"""The asyncio client of one vLLM server: tokens in, tokens and log-probabilities out, and the weight-update
calls.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import aiohttp

from megatron_dapo.config import RolloutConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.answer import completions_of
from megatron_dapo.rollout.errors import (
    OUT_OF_FILES,
    EngineDied,
    EngineStalled,
    RequestFailed,
    RequestRefused,
    out_of_files,
)
from megatron_dapo.rollout.progress import ProgressClock, ServerLoad, parse_load
from megatron_dapo.types import Completion

GENERATE = "/inference/v1/generate"
KEEP_ALIVE_S = 60.0  # below the server's (server.py), so that a reused connection is never a closed one
PROBE_TIMEOUT_S = 10.0  # of /health and /metrics
CONNECT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 600.0  # of one weight call: the largest chunk, or all the repacking at the end of a push
POLL_S = 1.0  # how often a server that has requests is asked how far it is
OWN_FILES = (
    256  # open files of a policy rank without its connections: sockets of torch, logs, workers, libraries
)
PauseMode = Literal["abort", "wait", "keep"]


def file_descriptors_needed(rollout: RolloutConfig) -> int:
    """Open files that the controller's process may need: each sequence in flight can have a connection of its
    own.
    """
    return OWN_FILES + rollout.engines * (rollout.max_concurrency + 4)


class EngineClient:
    """A client of the server at `url`, with its own connections. Use it inside one event loop; `await
    close()` at the end.

    Every call raises EngineDied when the server is gone, RequestRefused (4xx) or RequestFailed (5xx) with the
    server's words, TimeoutError when it does not answer, and UserError when this process may open no more
    files. `generate` has no limit on its total: it raises EngineStalled when the server makes no token for
    `progress_timeout_s`.
    """

    def __init__(self, url: str, token: str, *, progress_timeout_s: float = 30.0) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._progress_timeout_s = progress_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = 0  # requests that are not answered yet
        self._clock = ProgressClock(time.monotonic())
        self._watching: asyncio.Task[None] | None = None
        self._end: asyncio.Future[None] | None = None  # its exception ends every request in flight
        self._sent = 0  # sequences asked for so far
        self._reported: tuple[int, int] | None = (
            None  # the server's last word: sequences in it, `_sent` at that time
        )

    async def close(self) -> None:
        """Close the connections; requests in flight raise EngineDied."""
        self._end_requests(EngineDied(f"the client of {self.url} was closed"))
        if self._watching is not None:
            self._watching.cancel()
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

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
    ) -> list[Completion]:
        """Sample `n` completions of one prompt; cancelling the call aborts it on the server.

        Sample i uses `seed + i` (vLLM's rule), so seeds of different prompts should be at least `n` apart. A
        completion that ends by itself ends with its stop token, which has a log-probability like the others.
        `temperature` 0 is greedy and allows only n=1. `weight_version` is for tokens that the server names no
        version for.
        """
        params: dict[str, Any] = {
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
            "stop_token_ids": list(stop_token_ids),
        }
        if seed is not None:
            if seed < 0:
                raise ValueError(f"seed={seed} must not be negative; vLLM takes -1 for no seed")
            params["seed"] = seed
        body = {
            "request_id": request_id or uuid.uuid4().hex,
            "token_ids": list(prompt_tokens),
            "sampling_params": params,
        }
        self._sent += n
        answer = await self._watched(body)
        return completions_of(answer, n=n, seed=seed, weight_version=weight_version, url=self.url)

    def sequences_on_server(self) -> int | None:
        """Sequences that run or wait on the server, as it said last, and those sent since; None if it said
        nothing yet.

        A request counts here only with those of its sequences that have not ended.
        """
        if self._reported is None:
            return None
        sequences, sent = self._reported
        return sequences + self._sent - sent

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End requests by the id given to `generate`; their calls raise RequestFailed. Unknown ids are
        ignored.
        """
        names = [f"generate-tokens-{request_id}" for request_id in request_ids]
        if names:
            await self._call("POST", "/inference/v1/abort_requests", {"request_ids": names})

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Stop generating: `wait` for running requests, `abort` them, or `keep` them as they are."""
        await self._call("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def health(self) -> bool:
        """True if the server says within PROBE_TIMEOUT_S that its engine works. EngineDied if it is gone."""
        try:
            await self._call("GET", "/health", timeout_s=PROBE_TIMEOUT_S)
        except (RequestFailed, TimeoutError):
            return False
        return True

    async def warm_up(self, timeout_s: float) -> None:
        """Generate one token. A server's first request compiles and allocates, so it takes many times longer
        than others; and an engine that cannot run its model at all shows it here.
        """
        sampling = {
            "n": 1,
            "max_tokens": 1,
            "temperature": 1.0,
            "seed": 0,
            "logprobs": 0,
            "detokenize": False,
        }
        body = {"token_ids": [0], "sampling_params": sampling}
        await self._call("POST", GENERATE, body, timeout_s=timeout_s)

    async def load(self, timeout_s: float = PROBE_TIMEOUT_S) -> ServerLoad:
        """What the server counts about itself. UserError if its statistics are switched off."""
        text = await self._call("GET", "/metrics", timeout_s=timeout_s)
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
        while True:
            try:
                return await self.reset_prefix_cache()
            except RequestFailed:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.02)

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. RequestFailed while requests run, for then vLLM keeps the cache."""
        answer = await self._call("POST", "/reset_prefix_cache")
        if not answer["success"]:
            raise RequestFailed(
                f"{self.url} kept its prefix cache because requests are running; pause or finish them first",
                "busy",
            )

    async def init_weight_transfer(self, info: dict[str, Any] | None = None) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": info or {}})

    async def start_weight_update(self) -> None:
        await self._call("POST", "/start_weight_update")

    async def update_weights(self, info: dict[str, Any]) -> None:
        """Hand over one chunk (sync/manifest.py); when this returns the server no longer reads the memory."""
        await self._call("POST", "/update_weights", {"update_info": info})

    async def finish_weight_update(self, version: str) -> None:
        """Make the update current. RequestFailed naming every parameter that was not loaded in full."""
        await self._call("POST", "/finish_weight_update", {"weight_version": version})

    async def weight_version(self) -> str:
        """The version of the last finished update; 'default' before the first."""
        return (await self._call("GET", "/weight_info"))["weight_version"]

    async def _watched(self, body: dict[str, Any]) -> Any:
        """The answer to a generate request, unless the server stalls first (or the client is closed)."""
        if self._in_flight == 0:
            self._clock = ProgressClock(time.monotonic())
            self._end = asyncio.get_running_loop().create_future()
            self._watching = asyncio.create_task(self._watch())
        assert self._end is not None
        self._in_flight += 1
        call = asyncio.create_task(self._call("POST", GENERATE, body, timeout_s=None))
        try:
            await asyncio.wait({call, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                self._clock.answered(time.monotonic())
                return call.result()
            return self._end.result()
        finally:
            self._in_flight -= 1
            if self._in_flight == 0 and self._watching is not None:
                self._watching.cancel()
            call.cancel()
            await asyncio.wait({call})
            if not call.cancelled():
                call.exception()  # seen, if another error ends this request

    async def _watch(self) -> None:
        """Runs while requests are in flight: reads the server's counters, and ends the requests if they stand
        still.
        """
        interval_s = min(POLL_S, self._progress_timeout_s / 5)
        while True:
            await asyncio.sleep(interval_s)
            left_s = self._progress_timeout_s - self._clock.without_progress(time.monotonic())
            sent, load = self._sent, None
            try:
                load = await self.load(min(PROBE_TIMEOUT_S, max(left_s, interval_s)))
                self._reported = load.sequences, sent
            except UserError as error:
                return self._end_requests(error)
            except (RequestFailed, EngineDied, TimeoutError):
                pass  # no progress; a connection that breaks ends its request by itself
            now = time.monotonic()
            self._clock.observe(load.tokens if load else None, now)
            if (seconds := self._clock.without_progress(now)) > self._progress_timeout_s:
                return self._end_requests(
                    EngineStalled(
                        f"{self.url} made no token in {seconds:.0f} s, with {self._in_flight} requests in "
                        f"flight; if it is only slow, raise rollout.progress_timeout_s="
                        f"{self._progress_timeout_s:g}"
                    )
                )

    def _end_requests(self, error: Exception) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)
            self._end.exception()  # seen, should no request wait for it

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> Any:
        """JSON or text of the answer. `timeout_s` None: as long as it takes, once there is a connection."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        # After an exception the server drops the connection without saying so, and the next call on it would
        # look
        # like the server's death; only generate, of which there are many, reuses connections.
        headers = {} if path == GENERATE else {"Connection": "close"}
        try:
            async with self._open_session().request(
                method, self.url + path, json=body, headers=headers, timeout=timeout
            ) as response:
                if response.status == 200:
                    as_json = response.content_type == "application/json"
                    return await response.json() if as_json else await response.text()
                text = await response.text()
        except TimeoutError as error:
            raise TimeoutError(
                f"{self.url}{path} did not answer within {timeout_s or CONNECT_TIMEOUT_S:g} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            if out_of_files(error):
                raise UserError(OUT_OF_FILES) from error
            raise EngineDied(
                f"the engine at {self.url} is gone ({path}: {type(error).__name__}: {error})"
            ) from error
        message = f"{self.url}{path} answered {response.status}: {text[:2000]}"
        if response.status < 500:
            raise RequestRefused(message)
        if response.status == 503 or "EngineDead" in text or "EngineCore encountered" in text:
            raise EngineDied(message)
        raise RequestFailed(message, "server_error")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self._session
