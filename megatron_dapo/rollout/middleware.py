"""The run's token on every path of a vLLM server but /health, and the way to our own route (route.py).
Imported by the server (`--middleware`), so it stays light.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_dapo.environment import TOKEN_VARIABLE

OPEN_PATHS = frozenset({"/health"})
OWN_PATHS = "/megatron_dapo/"
REFUSAL = b'{"error": "this server belongs to a training run; send its token as Authorization: Bearer"}'

App = Callable[[Any, Any, Any], Awaitable[None]]


class RunToken:
    """ASGI middleware: 401 unless the request carries `Authorization: Bearer <token>` (websockets are refused
    alike). Requests for paths below OWN_PATHS go to our route, all others to vLLM.
    """

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise ValueError(
                f"{TOKEN_VARIABLE} is not set; start the server through EngineServer, which sets it"
            )
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._route: App | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._authorized(scope):
            is_ours = scope["type"] == "http" and scope["path"].startswith(OWN_PATHS)
            await (self._own_route() if is_ours else self._app)(scope, receive, send)
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

    def _own_route(self) -> App:
        """Made for its first request, when vLLM is loaded."""
        if self._route is None:
            from megatron_dapo.rollout.route import TokenRoute

            self._route = TokenRoute()
        return self._route
