"""Ports that engines listen on."""

from __future__ import annotations

import socket

from megatron_dapo.errors import UserError

LOOPBACK = "127.0.0.1"
_given_ports: set[int] = set()


def checked_port(base_port: int, index: int, address: str = LOOPBACK) -> int:
    """The fixed port of engine `index`; UserError when it cannot be used."""
    port = base_port + index
    with _probe(address) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"rollout.base_port={base_port}: port {port} for engine {index} cannot be used "
                f"({getattr(error, 'strerror', error)}); choose another rollout.base_port, or null to pick "
                f"free ports"
            ) from error
    return port


def free_port(address: str = LOOPBACK) -> int:
    """A port nobody listens on, not given out by this process before (servers bind seconds later)."""
    while True:
        with _probe(address) as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def _probe(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
