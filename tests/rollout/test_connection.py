"""The sockets of the client's connections. What its calls do: test_client.py, test_client_faults.py."""

from __future__ import annotations

import socket

from aiohttp import web
from support.http_server import serving

from megatron_dapo.lifeline import set_keepalive
from megatron_dapo.rollout.connection import Connection


async def test_every_connection_notices_a_host_that_went_silent(monkeypatch):
    """Within 30 s, whether a request waits for its answer or is still being sent."""
    made: list[socket.socket] = []

    def record(sock: socket.socket, timeout_s: int) -> None:
        made.append(sock)
        set_keepalive(sock, timeout_s)

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async with serving(health=health) as engine:
        connection = Connection(engine.url, "token")
        monkeypatch.setattr("megatron_dapo.rollout.connection.set_keepalive", record)
        assert await connection.call("GET", "/health") == "ok"
        (sock,) = made
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        idle, interval, count, unanswered_ms = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options
        )
        assert idle + interval * count == 30 and unanswered_ms == 30_000
        await connection.close()
