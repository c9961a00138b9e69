"""Nobody waits for the dead: one TCP connection from every process of a run to rank 0, with signs of life.

A collective may wait for hours, and neither gloo, NCCL nor the store can tell a peer that is busy from one
whose host has lost its power. On the lifeline both ends send a sign of life every few seconds, so both notice
a process that has ended (at once), one that is stopped and a host that is silent (within half a minute).
A thread watches, whatever the main thread waits for. Silence is counted in signs of life of our own, not in
seconds: a process that was itself stopped, or whose host slept, takes nobody for dead when it wakes up.
While one call holds the interpreter, so that the thread cannot run, a process beside ours gives the signs of
life (pulse.py).

A message is a line: an empty one is a sign of life, others are JSON:
    ["hello", token, name, host] -> ["welcome", host]     a process joins
    ["bye"]                                               it ends, and all is well
    ["failed", why]                                       it ends with an error, says a process to rank 0
    ["end", why]                                          the run ends, says rank 0
"""

from __future__ import annotations

import atexit
import hmac
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dapo.errors import UserError

LONGEST_LINE = 1 << 16  # bytes
LONGEST_REASON = 2000  # characters of an error that are passed on
LAST_WORDS_S = 5.0  # between the sentence that says who is lost and the end of the process
RANK_0 = "rank 0"


class LifelineRefused(UserError):
    """Rank 0 cannot be reached, or does not know this process's token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """beat_s: between two signs of life. silent_beats: of our own, without one of the peer, after which it
    counts as lost: with the defaults 20 to 24 s. grace_s: how long rank 0 itself has to end after another
    process said that it failed; often all fail alike, and rank 0 says it better. held_s: how long one call
    may hold a process's interpreter before the process counts as silent.
    """

    beat_s: float = 4.0
    silent_beats: int = 5
    grace_s: float = 30.0
    held_s: float = 300.0

    @property
    def silence_s(self) -> float:
        return self.beat_s * self.silent_beats


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Who is lost, and the sentence that says so. told: rank 0 has told us, so its console has it too."""

    peer: str
    reason: str
    told: bool = False


@dataclass(slots=True, eq=False)
class _Peer:
    """sock None: has not connected yet; name "": connected, and has not said who it is."""

    name: str
    host: str = ""
    sock: socket.socket | None = None
    silent_beats: int = 0
    received: bytes = b""

    def __str__(self) -> str:
        return f"{self.name} on {self.host}" if self.host else self.name


def rank_name(rank: int) -> str:
    return f"rank {rank}"


def set_keepalive(sock: socket.socket, timeout_s: int = 30) -> None:
    """Let `sock` fail with ETIMEDOUT about `timeout_s` seconds after its peer's host went silent, whether
    data are under way or not. A stopped process does not count: its kernel answers.
    """
    idle, interval = max(1, timeout_s // 3), max(1, timeout_s // 6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    # in ms; keepalive is silent while data that were sent wait for an answer
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (idle + 4 * interval))


class Lifeline:
    """Made by `serve` on rank 0 and by `join` elsewhere; `close` it at the end.

    on_loss(loss) is called in the watching thread, once for the loss that ends the run; it must return. On
    rank 0 it is called as well for each process that was not expected (engines of another host), whose loss
    does not end the run.
    """

    @classmethod
    def serve(
        cls,
        token: str,
        expected: Iterable[str],
        on_loss: Callable[[Loss], None],
        *,
        address: str = "",
        clocks: Clocks | None = None,
    ) -> Lifeline:
        """Listen on `address` ("": everywhere) and a free `port`. The `expected` processes end the run when
        they are lost, or do not join in time.
        """
        self = cls(token, on_loss, clocks or Clocks())
        everywhere = not address and socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            (address, 0),
            family=socket.AF_INET6 if everywhere else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=everywhere,
        )
        self.port = self._listener.getsockname()[1]
        self._peers = [_Peer(name) for name in expected]
        self._vital = {peer.name for peer in self._peers}
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._start()
        return self

    @classmethod
    def join(
        cls,
        address: tuple[str, int],
        token: str,
        name: str,
        on_loss: Callable[[Loss], None],
        *,
        clocks: Clocks | None = None,
    ) -> Lifeline:
        """Connect to rank 0 as `name`. LifelineRefused when that fails."""
        self = cls(token, on_loss, clocks or Clocks())
        host, port = address
        try:
            sock = socket.create_connection(address, timeout=self.clocks.silence_s)
            sock.sendall(_line("hello", token, name, socket.gethostname()))
            answer = _parse(sock.makefile("rb", buffering=0).readline(LONGEST_LINE))
        except OSError as error:
            raise LifelineRefused(
                f"{name} on {socket.gethostname()} cannot reach rank 0 at {host} port {port} ({error}); open "
                "the ports between the hosts of the run, or set MASTER_ADDR to an address that all reach"
            ) from error
        if not (isinstance(answer, list) and answer[:1] == ["welcome"]):
            raise LifelineRefused(
                f"rank 0 at {host} port {port} refused {name} on {socket.gethostname()}: another run's "
                "token, or a name that has joined already; give every run a MASTER_PORT of its own"
            )
        self._peers = [_Peer(RANK_0, host=answer[1])]
        self._vital = {RANK_0}
        self._attach(self._peers[0], sock)
        self._start()
        return self

    def __init__(self, token: str, on_loss: Callable[[Loss], None], clocks: Clocks) -> None:
        self.loss: Loss | None = None  # that ends the run, whether `on_loss` was called for it or not yet
        self.port = 0
        self._token, self._on_loss, self.clocks = token, on_loss, clocks
        self._listener: socket.socket | None = None
        self._peers: list[_Peer] = []
        self._vital: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._alarm, self._wake_up = socket.socketpair()
        self._selector.register(self._alarm, selectors.EVENT_READ, lambda: self._alarm.recv(1))
        self._report_at: float | None = None  # when `on_loss` is called for `loss`
        self._noticed, self._reported, self._closing = threading.Event(), threading.Event(), False
        self._last_words = _line("bye")
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def settle(self, timeout_s: float) -> Loss | None:
        """For a process that is about to end since a peer has left it: the loss behind that, once `on_loss`
        was called for it. Waits up to `timeout_s` for a loss, and for no grace.
        """
        if self._noticed.wait(timeout_s):
            self._report_at = 0.0
            self._interrupt()
            self._reported.wait(timeout_s)
        return self.loss

    def close(self, failure: str | None = None) -> None:
        """Say goodbye, or, with `failure`, why this process ends; the others end then too."""
        if failure is not None:
            self._last_words = _line("end" if self._listener else "failed", failure[:LONGEST_REASON])
        self._closing = True
        self._interrupt()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        atexit.unregister(self.close)

    # --- in the watching thread -------------------------------------------------------------

    def _start(self) -> None:
        self._pulse, theirs = socket.socketpair()
        command = [sys.executable, "-ISs", str(Path(__file__).with_name("pulse.py"))]
        command += map(str, (os.getpid(), self.clocks.beat_s, self.clocks.held_s))
        with theirs:
            self._beside = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        self._vouch(b"+", *(peer.sock for peer in self._peers if peer.sock))
        self._thread.start()
        atexit.register(self.close)

    def _interrupt(self) -> None:
        with suppress(OSError):
            self._wake_up.send(b"!")

    def _watch(self) -> None:
        next_beat = time.monotonic() + self.clocks.beat_s
        while not self._closing:
            # what has arrived is read before silence is counted
            for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                key.data()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.clocks.beat_s
                self._beat()
            if self._report_at is not None and time.monotonic() >= self._report_at:
                self._report()
        for peer in list(self._peers):
            self._send(peer, self._last_words)
            self._drop(peer)
        self._beside.kill()
        self._beside.wait()
        for sock in (self._listener, self._alarm, self._wake_up, self._pulse):
            if sock:
                sock.close()
        self._selector.close()

    def _beat(self) -> None:
        self._vouch(b".")
        for peer in list(self._peers):
            peer.silent_beats += 1
            if peer.silent_beats <= self.clocks.silent_beats:
                if peer.name:  # a stranger expects its welcome
                    self._send(peer, b"\n")
            elif peer.sock is None:
                self._lose(peer, f"has not connected to rank 0 within {self.clocks.silence_s:g} s")
            else:
                self._lose(
                    peer,
                    f"has given no sign of life for {self.clocks.silence_s:g} s: its process is stopped, or "
                    "its host or network is down",
                )

    def _accept(self) -> None:
        assert self._listener
        with suppress(OSError):  # it has gone away meanwhile
            sock, _ = self._listener.accept()
            peer = _Peer("")
            self._peers.append(peer)
            self._attach(peer, sock)

    def _attach(self, peer: _Peer, sock: socket.socket) -> None:
        peer.sock = sock
        sock.setblocking(False)
        set_keepalive(sock, max(6, round(self.clocks.silence_s)))
        self._selector.register(sock, selectors.EVENT_READ, partial(self._read, peer))

    def _read(self, peer: _Peer) -> None:
        assert peer.sock
        try:
            data = peer.sock.recv(LONGEST_LINE)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it was killed before it had read everything
            data = b""
        except OSError as error:
            return self._lose(peer, f"is gone ({error.strerror})")
        if not data:
            return self._lose(peer, "has ended without a word: its process was killed, or its host restarted")
        *lines, peer.received = (peer.received + data).split(b"\n")
        if peer.name:  # a stranger has the time of one silence to say who it is
            peer.silent_beats = 0
        for line in lines:
            if peer not in self._peers:
                return
            if line:
                self._hear(peer, line)
        if len(peer.received) > LONGEST_LINE:
            self._lose(peer, "speaks another language on the lifeline")

    def _hear(self, peer: _Peer, line: bytes) -> None:
        match _parse(line):
            case ["hello", str(token), str(name), str(host)] if self._listener and not peer.name:
                self._welcome(peer, token, name, host)
            case ["bye"] if peer.name:
                self._drop(peer)
            case ["failed", str(reason)] if peer.name and self._listener:
                self._drop(peer)
                self._end(
                    Loss(peer=peer.name, reason=f"{peer} has failed: {reason}"), in_s=self.clocks.grace_s
                )
            case ["end", str(reason)] if not self._listener:
                self._drop(peer)
                self._end(Loss(peer=peer.name, reason=reason, told=True))
            case _:
                self._lose(peer, "speaks another language on the lifeline")

    def _welcome(self, stranger: _Peer, token: str, name: str, host: str) -> None:
        known = next((peer for peer in self._peers if peer.name == name), None)
        right = hmac.compare_digest(token.encode(), self._token.encode())
        if not right or not name or (known and known.sock):
            return self._drop(stranger)
        if known:
            self._peers.remove(known)
        stranger.name, stranger.host, stranger.silent_beats = name, host, 0
        assert stranger.sock
        self._send(stranger, _line("welcome", socket.gethostname()))
        self._vouch(b"+", stranger.sock)

    def _send(self, peer: _Peer, data: bytes) -> None:
        """A failure, or a full buffer, shows soon enough as silence or an error of reading."""
        if peer.sock:
            with suppress(OSError):
                peer.sock.send(data)

    def _vouch(self, data: bytes, *connections: socket.socket) -> None:
        """Say to pulse.py that we are there, and pass new connections on. Without it there is ourselves."""
        with suppress(OSError):
            socket.send_fds(self._pulse, [data], [sock.fileno() for sock in connections])

    def _drop(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        if peer.sock:
            self._selector.unregister(peer.sock)
            with suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)  # pulse.py has it open, too
            peer.sock.close()

    def _lose(self, peer: _Peer, reason: str) -> None:
        self._drop(peer)
        loss = Loss(peer=peer.name, reason=f"{peer} {reason}")
        if peer.name in self._vital:
            self._end(loss)
        elif peer.name:
            self._on_loss(loss)

    def _end(self, loss: Loss, in_s: float = 0.0) -> None:
        """The first loss counts; one that was seen ends the grace of an earlier one that was announced."""
        if not self._reported.is_set() and (self.loss is None or in_s == 0.0):
            self.loss, self._report_at = loss, time.monotonic() + in_s
            self._noticed.set()

    def _report(self) -> None:
        self._report_at = None
        if self.loss is None or self._reported.is_set():
            return
        if self._listener:
            for peer in self._peers:
                self._send(peer, _line("end", self.loss.reason))
        self._on_loss(self.loss)
        self._reported.set()


def end_process(loss: Loss, *, speaks: bool, remedy: str) -> None:
    """Print one sentence (if this process `speaks`), and end the process in 5 s, whatever its main thread
    waits for, unless that has ended it by then.
    """
    if speaks:
        print(f"error: {loss.reason}; {remedy}", file=sys.stderr, flush=True)
    timer = threading.Timer(LAST_WORDS_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def _line(*message: str) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> object:
    """None for what is no message."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
