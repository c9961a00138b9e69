"""The run's token on every path of a vLLM server but /health. Imported by the server (`--middleware`), so it
stays light.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_dapo.environment import TOKEN_VARIABLE

OPEN_PATHS = frozenset({"/health"})
REFUSAL = b'{"error": "this server belongs to a training run; send its token as Authorization: Bearer"}'

App = Callable[[Any, Any, Any], Awaitable[None]]


class RunToken:
    """ASGI middleware: 401 unless the request carries `Authorization: Bearer <token>` (websockets are refused
    alike).
    """

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise ValueError(
                f"{TOKEN_VARIABLE} is not set; start the server through EngineServer, which sets it"
            )
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(REFUSAL)).encode()),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _authorized(self, scope: Any) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
