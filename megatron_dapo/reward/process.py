"""One grading process as its parent sees it; `worker.py` says what they send each other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_dapo.reward.worker import SIZES

# `-c` rather than a script: a script would put this folder, whose math.py hides the standard one, on the
# path.
_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from megatron_dapo.reward.worker import main
main(int(sys.argv[2]))
"""
_READ_BYTES = 1 << 16


class WorkerProcess:
    """A started process and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                "-c",
                _BOOT,
                json.dumps([str(folder) for folder in sys.path]),
                str(os.getpid()),
            ]
            # Its own session: Ctrl-C is the trainer's to handle, and what a rule starts is killed with it.
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)

    def send(self, head: list[Any], bodies: Sequence[bytes], timeout_s: float) -> None:
        """One frame. TimeoutError if it is not taken in `timeout_s`, ConnectionError when the process is
        gone.
        """
        header = json.dumps(head).encode()
        self._socket.settimeout(timeout_s)
        sizes = SIZES.pack(len(header), sum(map(len, bodies)))
        self._socket.sendall(b"".join((sizes, header, *bodies)))

    def replies(self, count: int, timeout_s: float) -> Iterator[list[Any]]:
        """The next `count` replies, those that have come together at a time.

        TimeoutError when nothing comes for `timeout_s`; EOFError or ConnectionError when the process is gone.
        """
        self._socket.settimeout(timeout_s)
        rest = b""
        while count:
            if not (data := self._socket.recv(_READ_BYTES)):
                raise EOFError("the worker closed its socket")
            *lines, rest = (rest + data).split(b"\n")
            count -= len(lines)
            if lines:
                yield [json.loads(line) for line in lines]

    def hang_up(self) -> None:
        """Have whoever waits for a reply see the end of it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> str:
        """End the process and all it started; how it ended, in words."""
        self.hang_up()
        died_by_itself = _wait(self.process, 0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()
        return f"exit status {self.process.returncode}" if died_by_itself else "killed"


def _wait(process: subprocess.Popen, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
