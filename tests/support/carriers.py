"""Processes that carry for pretended hosts without ranks (sync/host_carrier.py), and die or stand still on
demand.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_dapo.sync import host_carrier
from megatron_dapo.sync.host_carrier import HostCarrier
from megatron_dapo.sync.host_link import HEADER

# When a carrier is struck: before it answers an order; at the first connection; when it waits for the second
# round; when it is about to receive that; and when it is about to answer that it has it.
PHASES = ("answer", "connect", "begin", "send", "staged")


class Carriers:
    """Starts carriers for a run's store. They are forked by a helper, which has imported everything."""

    def __init__(self, store: dist.TCPStore) -> None:
        command = [sys.executable, "-m", "support.carriers", store.host, str(store.port)]
        pipe = subprocess.PIPE
        self._helper = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._pids: dict[str, int] = {}

    def start(self, host: str, fault: str = "") -> None:
        """fault: a phase, and `kill` (-9) or `stop`."""
        assert self._helper.stdin and self._helper.stdout
        self._helper.stdin.write(f"{host} {fault}\n")
        self._helper.stdin.flush()
        self._pids[host] = int(self._helper.stdout.readline())

    def kill(self, host: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids.pop(host), signal.SIGKILL)

    def close(self) -> None:
        for host in list(self._pids):
            self.kill(host)
        self._helper.communicate()


class Struck:
    """A connection to a carrier, which strikes when it is time."""

    def __init__(self, connection: socket.socket, phase: str, strike: Callable[[], None]) -> None:
        self._connection, self._phase, self._strike = connection, phase, strike
        self._rounds = self._reads = 0

    def recv_into(self, target: memoryview) -> int:
        self._reads += 1
        if (
            (self._phase == "connect" and self._reads == 1)
            or (self._phase == "begin" and self._rounds == 1)
            or (self._phase == "send" and self._rounds == 1 and len(target) != HEADER.size)
        ):
            self._strike()
        return self._connection.recv_into(target)

    def sendall(self, data: bytes) -> None:
        self._rounds += 1
        if self._phase == "staged" and self._rounds == 2:
            self._strike()
        self._connection.sendall(data)

    def shutdown(self, how: int) -> None:
        self._connection.shutdown(how)


def carry(address: str, port: int, host: str, phase: str = "", kind: str = "") -> None:
    """A carrier, as long as the helper lives."""

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    serve, obey = host_carrier._Receiving._serve, HostCarrier._obey

    def struck_serve(receiving: Any, connection: Any) -> None:
        serve(receiving, Struck(connection, phase, strike))  # type: ignore[arg-type]

    def struck_obey(*arguments: Any) -> Any:
        if phase == "answer":
            strike()
        return obey(*arguments)

    host_carrier._Receiving._serve, HostCarrier._obey = struck_serve, struck_obey
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    HostCarrier(store, host, "127.0.0.1").start()
    helper = os.getppid()
    while os.getppid() == helper:
        time.sleep(0.1)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            carry(sys.argv[1], int(sys.argv[2]), *line.split())
        print(pid, flush=True)


if __name__ == "__main__":
    main()
