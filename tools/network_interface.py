#!/usr/bin/env python3
"""Print the network interface that leads from this host to an address, for GLOO_SOCKET_IFNAME.

    python tools/network_interface.py HOST

On HOST itself it is the interface that has the address. A loopback is refused: other hosts cannot reach it.
"""

from __future__ import annotations

import socket
import sys

import psutil


def interface_to(host: str) -> str:
    """Its name. ValueError says what to do when there is none that other hosts can reach."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)  # sends nothing; the kernel chooses the route
            own = sock.getsockname()[0]
    except OSError as error:
        raise ValueError(f"{host}: no route to it ({error}); correct it") from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == family and entry.address.split("%")[0] == own for entry in addresses):
            if name == "lo":
                break
            return name
    raise ValueError(
        f"{host} is {own} here, which other hosts cannot reach; give the address of an "
        "interface, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )


if __name__ == "__main__":
    try:
        print(interface_to(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: MASTER_ADDR={error}")
