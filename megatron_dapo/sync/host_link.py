"""From the ranks to the processes that serve hosts without ranks (the other end: host_carrier.py).

Every rank that sends to such a host has a TCP connection of its own to its process. It says where in the
process's memory each message goes, and asks at the end of a round whether all of it lies there. Where that
fails on any rank, or takes too long, all ranks give the host up for this push, and connect again for the
next one that needs it. Gloo would not do: what it throws in threads of its own when a peer is lost can end
the process, and a host that is lost must not cost a rank.

On a connection: the order's token; then, for each message, HEADER (byte in the memory, its bytes, bytes that
follow, fingerprint) and what follows: its bytes, or a delta (delta.py) if those are fewer. A message without
bytes is the end of a round, which is answered with STAGED.

In the run's store, under megatron_dapo/carrier/HOST/:

    order      of rank 0: {"number", "token", "num_bytes" of memory}; each has a new number and replaces the
               one before, with its memory and connections
    answer/N   of the process: {"path" of the memory, "address", "port"}, or {"error"}
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.lifeline import set_keepalive
from megatron_dapo.sync.plan import Plan

POLL_S = 0.02
NO_PATH = "/not/connected"
TOKEN_BYTES = 32
HEADER = struct.Struct("!QQQq")
STAGED = b"!"


class HostLinks:
    """One rank's connections to the hosts without ranks of a plan.

    control: a gloo group of all ranks. store: of the run, without prefixes. sizes: of the memory, by host.
    timeout_s: how long a host may stand still.
    """

    def __init__(
        self, plan: Plan, rank: int, control: Any, store: Any, *, sizes: Mapping[str, int], timeout_s: float
    ) -> None:
        self._rank, self._control = rank, control
        self._store, self._sizes, self._timeout_s = store, sizes, timeout_s
        carriers = {plan.carriers[message.worker] for message in plan.messages if message.source == rank}
        self._mine = {host for host in sizes if host in carriers}  # that this rank sends to
        self._paths: dict[str, str] = {}  # by host that is connected; the same on all ranks
        self._connections: dict[str, _Connection] = {}
        self._lost: dict[str, str] = {}  # what went wrong on this rank and was not told to the others yet

    def path(self, host: str) -> str:
        """Of the memory of a host, or NO_PATH when it is not connected."""
        return self._paths.get(host, NO_PATH)

    def connect(self, hosts: Collection[str]) -> dict[str, str]:
        """Connect to those that are not. Returns the hosts that cannot be had, and why. Collective."""
        new = [host for host in self._sizes if host in hosts and host not in self._paths]
        if not new:
            return {}
        answers = [self._order(new) if self._rank == 0 else {}]
        dist.broadcast_object_list(answers, group=self._control, group_src=0)
        for host in new:
            answer = answers[0][host]
            self._paths[host] = answer.get("path", NO_PATH)
            if "error" in answer:
                self._lost[host] = answer["error"]
            elif host in self._mine:
                where = answer["address"], answer["port"]
                self._attempt(host, partial(self._connect, host, where, answer["token"]))
        return self.agree()

    def send(self, host: str, begin: int, size: int, body: torch.Tensor, fingerprint: int) -> Sending:
        """Begin to send a message of `size` bytes to this byte of the host's memory. A body with fewer bytes
        is a delta; the fingerprint is checked if it is not NOTHING.
        """
        header = HEADER.pack(begin, size, body.nbytes, fingerprint)
        return Sending(self, host, lambda connection: connection.send(header, body))

    def finish(self, hosts: Collection[str]) -> list[Sending]:
        """Begin to ask those of these hosts that this rank sends to whether all messages have arrived."""
        return [Sending(self, host, lambda connection: connection.finish()) for host in self._mine & {*hosts}]

    def agree(self) -> dict[str, str]:
        """When all ranks are here: the hosts that any of them has lost, and why. They have to be connected
        again. Collective.
        """
        if not self._paths:
            dist.barrier(group=self._control)
            return {}
        lost = agreed(self._lost, self._control)
        for host in lost:
            self._disconnect(host)
        self._lost = {}
        return {
            host: f"{host} cannot be sent weights (rank {rank}: {reason})"
            for host, (rank, reason) in lost.items()
        }

    def close(self) -> None:
        for host in list(self._paths):
            self._disconnect(host)

    def _order(self, hosts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """On rank 0: have the hosts make memory; what each has answered."""
        waiting, answers = {}, {}
        for host in hosts:
            number = self._store.add(f"{key(host)}/orders", 1)
            order = {"number": number, "token": secrets.token_hex(TOKEN_BYTES // 2)}
            self._store.set(f"{key(host)}/order", json.dumps(order | {"num_bytes": self._sizes[host]}))
            waiting[host] = f"{key(host)}/answer/{number}", order["token"]
            answers[host] = {"error": f"it has not answered within {self._timeout_s:g} s"}
        deadline = time.monotonic() + self._timeout_s
        while waiting and time.monotonic() < deadline:
            for host in [host for host, (answer, _) in waiting.items() if self._store.check([answer])]:
                answer, token = waiting.pop(host)
                answers[host] = json.loads(self._store.get(answer)) | {"token": token}
            time.sleep(POLL_S)
        return answers

    def _connect(self, host: str, where: tuple[str, int], token: str) -> None:
        self._connections[host] = _Connection(where, token, self._timeout_s)

    def _disconnect(self, host: str) -> None:
        del self._paths[host]
        if connection := self._connections.pop(host, None):
            connection.close()

    def _attempt(self, host: str, what: Callable[[], Any]) -> Any:
        """What it returns. What goes wrong costs the host, as `agree` will say: no more is tried with it."""
        if host not in self._lost:
            try:
                return what()
            except OSError as error:
                self._lost[host] = str(error) or type(error).__name__
        return None


class Sending:
    """Something on its way to a host; `wait` never raises."""

    def __init__(self, links: HostLinks, host: str, begin: Callable[[_Connection], Future[None]]) -> None:
        self._links, self._host = links, host
        connection = links._connections.get(host)
        self._work = links._attempt(host, lambda: begin(connection)) if connection else None

    def wait(self) -> None:
        if self._work is not None:
            self._links._attempt(self._host, self._work.result)


class _Connection:
    """To one host; what it is asked to do happens in the order of the calls, in a thread of its own. OSError
    when the host is gone, or stands still for `timeout_s`.
    """

    def __init__(self, where: tuple[str, int], token: str, timeout_s: float) -> None:
        self._socket = socket.create_connection(where, timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(self._socket, max(6, round(timeout_s)))
        self._socket.sendall(token.encode())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="to a serving host")

    def send(self, header: bytes, body: torch.Tensor) -> Future[None]:
        return self._thread.submit(self._send, header, body.numpy().data)

    def finish(self) -> Future[None]:
        return self._thread.submit(self._finish)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._socket.close()
        self._thread.shutdown(wait=False)

    def _send(self, header: bytes, body: memoryview) -> None:
        with self._closed_on_error():
            self._socket.sendall(header)
            while body:  # `sendall` would give the whole message no more than `timeout_s`
                body = body[self._socket.send(body) :]

    def _finish(self) -> None:
        with self._closed_on_error():
            self._socket.sendall(HEADER.pack(0, 0, 0, 0))
            if self._socket.recv(1) != STAGED:
                raise ConnectionError("it has closed the connection")

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """So that what comes next fails at once."""
        try:
            yield
        except OSError:
            self._socket.close()
            raise


def agreed(lost: Mapping[Any, str], control: Any) -> dict[Any, tuple[int, str]]:
    """When all ranks are here: what any of them has lost, and the first rank that did, with its reason.
    Collective.
    """
    num_lost = torch.tensor(len(lost))
    dist.all_reduce(num_lost, group=control)
    if not num_lost.item():
        return {}
    found: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(found, dict(lost), group=control)
    reasons: dict[Any, tuple[int, str]] = {}
    for rank, of_rank in enumerate(found):
        for item, reason in of_rank.items():
            reasons.setdefault(item, (rank, reason))
    return reasons


def key(host: str) -> str:
    """What the keys of a host begin with."""
    return f"megatron_dapo/carrier/{host}"
