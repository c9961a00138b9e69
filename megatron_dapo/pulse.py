"""Signs of life on a process's lifeline while one call holds its interpreter, so that none of its threads can
give them: a small process beside it, started by lifeline.py as `python pulse.py PID BEAT_S HELD_S`.

Its standard input is a socket to that process, which passes its connections on and says with every beat that
it is there. It ends with that process. There is no sign of life while that process is stopped (SIGSTOP), or
has said nothing for HELD_S. Standard library only: no other file of the package is imported.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from pathlib import Path

MOST_AT_ONCE = 64  # connections in one message


def main(pid: int, beat_s: float, held_s: float) -> None:
    parent = socket.socket(fileno=sys.stdin.fileno())
    connections: list[socket.socket] = []
    heard = time.monotonic()
    next_beat = heard + beat_s
    while True:
        if select.select([parent], [], [], max(0.0, next_beat - time.monotonic()))[0]:
            data, descriptors, _, _ = socket.recv_fds(parent, MOST_AT_ONCE, MOST_AT_ONCE)
            if not data:
                return  # it has ended
            heard = time.monotonic()
            connections += [socket.socket(fileno=descriptor) for descriptor in descriptors]
        if (now := time.monotonic()) >= next_beat:
            next_beat = now + beat_s
            if now - heard < held_s and is_running(pid):
                connections = [connection for connection in connections if beat(connection)]


def beat(connection: socket.socket) -> bool:
    """Give a sign of life; False, and it is closed, when the connection has ended."""
    try:
        connection.send(b"\n", socket.MSG_DONTWAIT)
    except BlockingIOError:
        pass  # full: the peer will see it as silence soon enough
    except OSError:
        connection.close()
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether the process is there, and neither stopped nor a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("T", "t", "Z")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
