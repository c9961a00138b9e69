"""The asyncio client of one vLLM server: tokens in, tokens and log-probabilities out, and the weight-update calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import aiohttp

from megatron_dapo.types import Completion

GENERATE = "/inference/v1/generate"
NOT_A_LOGPROB = -9999.0  # what vLLM sends for NaN and -inf
KEEP_ALIVE_S = 60.0  # below the server's (launch.py), so that a reused connection is never a closed one
PauseMode = Literal["abort", "wait", "keep"]


class EngineDied(RuntimeError):
    """The server is gone, or its engine is."""


class GenerationAborted(RuntimeError):
    """The server ended a request before it was complete: `abort`, or `pause("abort")`."""


class Engine:
    """A client of the server at `url`. Use it inside one event loop, and `await close()` at the end.

    Every call raises EngineDied when the server is gone, ValueError for a request it refuses (4xx), RuntimeError when it
    fails (5xx), both with the server's words, and TimeoutError.
    """

    def __init__(self, url: str, token: str, request_timeout_s: float) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, connect=None, sock_connect=30)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
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

        Sample i uses `seed + i` (vLLM's rule), so seeds of different prompts should be at least `n` apart. A completion that
        ends by itself ends with its stop token, which has a log-probability like the others. `temperature` 0 is greedy and
        allows only n=1. `weight_version` goes into the completions, unless the server names an older one.
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
        answer = await self._call("POST", GENERATE, body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != n:
            raise RuntimeError(f"{self.url} returned {len(choices)} completions of {n}")
        return [
            _completion(choice, weight_version, None if seed is None else seed + i, self.url) for i, choice in enumerate(choices)
        ]

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End requests by the id given to `generate`; their calls raise GenerationAborted. Unknown ids are ignored."""
        names = [f"generate-tokens-{request_id}" for request_id in request_ids]
        if names:
            await self._call("POST", "/inference/v1/abort_requests", {"request_ids": names})

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Stop generating: `wait` for running requests, `abort` them, or `keep` them frozen until `resume`."""
        await self._call("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def health(self) -> bool:
        """True when the server says its engine works."""
        try:
            await self._call("GET", "/health")
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, EngineDied):
                raise
            return False
        return True

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. RuntimeError while requests run, for then vLLM keeps the cache."""
        answer = await self._call("POST", "/reset_prefix_cache")
        if not answer["success"]:
            raise RuntimeError(f"{self.url} kept its prefix cache because requests are running; pause or finish them first")

    async def init_weight_transfer(self, info: dict[str, Any] | None = None) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": info or {}})

    async def start_weight_update(self) -> None:
        await self._call("POST", "/start_weight_update")

    async def update_weights(self, info: dict[str, Any]) -> None:
        """Hand over one bucket (bridge/transfer.py); when this returns the server no longer reads the memory."""
        await self._call("POST", "/update_weights", {"update_info": info})

    async def finish_weight_update(self, version: str) -> None:
        """Make the update current. RuntimeError naming every parameter that was not loaded in full."""
        await self._call("POST", "/finish_weight_update", {"weight_version": version})

    async def weight_version(self) -> str:
        """The version of the last finished update; 'default' before the first."""
        return (await self._call("GET", "/weight_info"))["weight_version"]

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        session = self._open_session()
        # After an exception the server drops the connection without saying so, and the next call on it would look like the
        # server's death; only generate, of which there are many, reuses connections.
        headers = {} if path == GENERATE else {"Connection": "close"}
        try:
            async with session.request(method, self.url + path, json=body, headers=headers) as response:
                if response.status == 200:
                    return await response.json() if response.content_type == "application/json" else None
                text = await response.text()
        except TimeoutError as error:
            raise TimeoutError(
                f"{self.url}{path} did not answer within rollout.request_timeout_s={self._timeout.total:g}; raise it for long "
                "responses"
            ) from error
        except aiohttp.ClientError as error:
            raise EngineDied(f"the engine at {self.url} is gone ({path}: {type(error).__name__}: {error})") from error
        message = f"{self.url}{path} answered {response.status}: {text[:2000]}"
        if response.status < 500:
            raise ValueError(message)
        if response.status == 503 or "EngineDead" in text or "EngineCore encountered" in text:
            raise EngineDied(message)
        raise RuntimeError(message)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, connector=connector)
        return self._session


def _completion(choice: dict[str, Any], weight_version: int, seed: int | None, url: str) -> Completion:
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise GenerationAborted(f"{url} ended a request early (finish reason {reason!r})")
    logprobs = tuple(entry["logprob"] for entry in choice["logprobs"]["content"])
    if any(logprob <= NOT_A_LOGPROB for logprob in logprobs):
        raise RuntimeError(f"{url} returned log-probabilities that are not numbers; its weights are likely broken")
    spans = choice.get("weight_versions") or ()
    labels = [int(span["version"]) for span in spans if span["version"].isdigit()]
    return Completion(
        tokens=tuple(choice["token_ids"]),
        logprobs=logprobs,
        finish_reason=reason,
        weight_version=min([weight_version, *labels]),
        seed=seed,
    )
