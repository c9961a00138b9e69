"""The carrier on a host without ranks: receives what the ranks send to the engines there, into memory that
the engines' workers map (the ranks' end, and what is said: host_link.py).
"""

from __future__ import annotations

import hmac
import json
import select
import socket
import threading
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.lifeline import set_keepalive
from megatron_dapo.sync.delta import NOTHING, DeltaError, restore
from megatron_dapo.sync.host_link import HEADER, STAGED, TOKEN_BYTES, key
from megatron_dapo.sync.staging_memory import StagingMemory

POLL_S = 0.1  # how often it looks for an order


class HostCarrier:
    """Carries for the engines of `host`, as the run knows it, from `start` to `close`. address: of this host,
    as the ranks reach it. store: of the run, without prefixes; a connection of its own.
    """

    def __init__(self, store: Any, host: str, address: str) -> None:
        self._store, self._host, self._address = store, host, address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        self._receiving: _Receiving | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="carrier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _carry(self) -> None:
        number = 0  # of the newest order
        with suppress(dist.DistError):  # the store has ended; so has the run
            while not self._closing.is_set():
                patience = POLL_S
                while select.select([self._listener], [], [], patience)[0]:
                    self._accept()
                    patience = 0.0  # the ranks connect at about the same time
                if self._store.check([f"{key(self._host)}/order"]):
                    order = json.loads(self._store.get(f"{key(self._host)}/order"))
                    if order["number"] > number:
                        number = order["number"]
                        self._store.set(f"{key(self._host)}/answer/{number}", json.dumps(self._obey(order)))
        if self._receiving:
            self._receiving.close()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it has gone away meanwhile
            connection, _ = self._listener.accept()
            if self._receiving:
                self._receiving.serve(connection)
            else:
                connection.close()

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to an order. The old memory is gone before there is new memory."""
        if self._receiving:
            self._receiving.close()
            self._receiving = None
        try:
            self._receiving = _Receiving(order["num_bytes"], order["token"])
        except (OSError, ValueError) as error:
            return {"error": f"no memory for the weights: {error}"}
        port = self._listener.getsockname()[1]
        return {"path": self._receiving.memory.path, "address": self._address, "port": port}


class _Receiving:
    """The memory of an order, and the connections that write to it, each in a thread."""

    def __init__(self, num_bytes: int, token: str) -> None:
        self.memory, self._token = StagingMemory(num_bytes), token
        self._connections: list[tuple[socket.socket, threading.Thread]] = []

    def serve(self, connection: socket.socket) -> None:
        set_keepalive(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=self._serve, args=(connection,), name="from a rank", daemon=True)
        self._connections.append((connection, thread))
        thread.start()

    def close(self) -> None:
        for connection, thread in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            connection.close()
        self.memory.close()

    def _serve(self, connection: socket.socket) -> None:
        """Until the rank has ended, or given this host up, or a delta goes wrong, of which it learns by the
        end of the connection.
        """
        try:
            token = bytearray(TOKEN_BYTES)
            _read(connection, memoryview(token))
            if hmac.compare_digest(token, self._token.encode()):
                _receive(connection, self.memory.bytes)
        except (OSError, DeltaError):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _receive(connection: socket.socket, memory: torch.Tensor) -> None:
    """Message after message, until the rank closes the connection."""
    header = bytearray(HEADER.size)
    while True:
        _read(connection, memoryview(header))
        begin, size, body_bytes, fingerprint = HEADER.unpack(header)
        if begin + size > len(memory) or body_bytes > size:
            raise ConnectionError("a message is not for this memory")
        if not size:
            connection.sendall(STAGED)
            continue
        target = memory[begin : begin + size]
        body = torch.empty(body_bytes, dtype=torch.uint8) if body_bytes < size else target
        _read(connection, body.numpy().data)
        if fingerprint != NOTHING:
            restore(body, target, fingerprint)


def _read(connection: socket.socket, target: memoryview) -> None:
    """Fill the target. ConnectionError when the connection ends before."""
    while target:
        count = connection.recv_into(target)
        if count == 0:
            raise ConnectionError("the rank has closed the connection")
        target = target[count:]
