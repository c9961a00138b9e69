"""The HTTP connections to one vLLM server: calls, streams of frames, and what their failures mean."""

from __future__ import annotations

import functools
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from megatron_dapo.errors import UserError
from megatron_dapo.lifeline import set_keepalive
from megatron_dapo.rollout.errors import (
    OUT_OF_FILES,
    EngineDied,
    RequestFailed,
    RequestRefused,
    out_of_files,
)
from megatron_dapo.rollout.wire import (
    GENERATE_PATH,
    EndFrame,
    ErrorFrame,
    FrameDecoder,
    TokensFrame,
    WireError,
)

JSON_PATH = "/inference/v1/generate"  # vLLM's own route
SAMPLING_PATHS = (GENERATE_PATH, JSON_PATH)
KEEP_ALIVE_S = 60.0  # below the server's (server.py), so that a reused connection is never a closed one
CONNECT_TIMEOUT_S = 30.0
SILENT_HOST_S = 30  # a host without power or network sends no word of its end
CALL_TIMEOUT_S = 600.0  # of a call that has no limit of its own
READ_BUFFER = 1 << 20  # bytes that may wait to be read before the server is slowed down


class Connection:
    """Use it inside one event loop; `await close()` at the end.

    Every call raises EngineDied when the server is gone, RequestRefused (4xx) or RequestFailed (5xx) with the
    server's words, TimeoutError when it does not answer, and UserError when this process may open no more
    files. `timeout_s` None: as long as it takes, once there is a connection.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> Any:
        """JSON or text of the answer."""
        async with self._answered(method, path, body, timeout_s) as response:
            as_json = response.content_type == "application/json"
            return await response.json() if as_json else await response.text()

    async def frames(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[TokensFrame, None]:
        """The responses of an answer in frames, each as it arrives. RequestFailed if it is no such answer."""
        decoder = FrameDecoder()
        async with self._answered(method, path, body, timeout_s) as response:
            try:
                async for piece in response.content.iter_any():
                    for frame in decoder.feed(piece):
                        if isinstance(frame, TokensFrame):
                            yield frame
                        elif isinstance(frame, ErrorFrame):
                            raise _error(self.url + path, frame.status, frame.text, frame.reason)
                        else:
                            assert isinstance(frame, EndFrame)
                decoder.finish()
            except WireError as error:
                raise RequestFailed(f"{self.url}{path}: {error}", "incomplete") from error

    @asynccontextmanager
    async def _answered(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, and words for what goes wrong while it is read."""
        try:
            async with await self._send(method, path, body, timeout_s) as response:
                if response.status != 200:
                    text = await response.text()
                    raise _error(self.url + path, response.status, text, "server_error")
                yield response
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

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> aiohttp.ClientResponse:
        """After an exception a server drops the connection without saying so, and the next request on it
        looks like the server's death. So connections are used again only by requests that may be made twice.
        """
        repeatable = method == "GET" or path in SAMPLING_PATHS
        send = functools.partial(
            self._session(repeatable).request,
            method,
            self.url + path,
            json=body,
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        )
        try:
            return await send()
        except aiohttp.ServerDisconnectedError:
            if not repeatable:
                raise
            return await send()

    def _session(self, reuse: bool) -> aiohttp.ClientSession:
        """With connections that are used again, or only once."""
        if reuse not in self._sessions:
            options: dict[str, Any] = {"keepalive_timeout": KEEP_ALIVE_S} if reuse else {"force_close": True}
            self._sessions[reuse] = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket, **options),
                read_bufsize=READ_BUFFER,
            )
        return self._sessions[reuse]


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """That fails SILENT_HOST_S after the server's host went silent, though a request may take for ever."""
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    set_keepalive(sock, SILENT_HOST_S)
    return sock


def _error(where: str, status: int, text: str, reason: str) -> Exception:
    """What an answer that is not 200 means for the request and for the engine."""
    message = f"{where} answered {status}: {text[:2000]}"
    if status < 500:
        return RequestRefused(message, status)
    if status == 503 or "EngineDead" in text or "EngineCore encountered" in text:
        return EngineDied(message)
    return RequestFailed(message, reason)
