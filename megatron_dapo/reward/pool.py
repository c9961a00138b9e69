"""Grading in processes that can be killed: a verifier that hangs or crashes costs one answer, never the run.

    with GradingPool("dapo", workers=2, timeout_s=10, decoder=decoder_source(tokenizer)) as pool:
        grade = await pool.grade_tokens(completion.tokens, answer)  # decoded in the worker
        grades = await pool.grade(texts, answer)

Each worker process (`worker.py`) has a thread here that sends it one response after another and waits for
its lines, so the event loop of the caller never waits, and any loop will do. The thread starts its own
process and outlives it: the kernel's "die with the parent" follows the thread that forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_dapo.errors import UserError
from megatron_dapo.reward.decoding import DecoderSource
from megatron_dapo.reward.worker import SIZES, TEXT_ERRORS

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

Outcome = Literal["graded", "timeout", "error"]

# How long a worker may take to import its verifier and load its tokenizer.
START_TIMEOUT_S = 120.0
# `-c` rather than a script: a script would put this folder, whose math.py hides the standard one, on the
# path.
_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from megatron_dapo.reward.worker import main
main(int(sys.argv[2]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """One response's grade. `correct` is None unless `outcome` is "graded"."""

    correct: bool | None
    outcome: Outcome


_TIMEOUT = Grade(correct=None, outcome="timeout")
_ERROR = Grade(correct=None, outcome="error")


class GradingPool:
    """`workers` processes that run `verifier` ('dapo', 'math_verify' or 'package.module:function').

    decoder: where they load the tokenizer from, for `grade_tokens`; None: `grade` alone works.
    A response over `timeout_s`, decoding included, has its worker killed and restarted and counts as
    "timeout"; an exception or a crash as "error". Neither is a grade, and the first of each kind is
    logged. The constructor waits until the workers are ready and raises UserError if they cannot load the
    verifier or the tokenizer.

    A waiting response costs a reference to its tokens: how many wait is bounded by how many are sampled.
    """

    def __init__(
        self, verifier: str, workers: int, timeout_s: float, decoder: DecoderSource | None = None
    ) -> None:
        if workers < 1:
            raise UserError(f"reward.workers={workers} must be at least 1; raise it")
        if not timeout_s > 0:
            raise UserError(f"reward.timeout_s={timeout_s} must be above 0 seconds; raise it")
        self._decodes = decoder is not None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # makes "put a job" and "close" exclude each other
        self._closed = False
        log = _FirstOfEach()
        self._graders = [_Grader(verifier, decoder, timeout_s, self._jobs, log) for _ in range(workers)]
        try:
            for grader in self._graders:
                grader.ready.result()
        except BaseException:
            self.close()
            raise

    async def grade(self, responses: Sequence[str], answer: str) -> list[Grade]:
        """Grades in the order of the responses. RuntimeError if the pool is closed or a worker cannot be
        restarted.
        """
        bodies = [response.encode(errors=TEXT_ERRORS) for response in responses]
        return await asyncio.gather(*(self._put("text", body, answer) for body in bodies))

    async def grade_tokens(self, tokens: np.ndarray, answer: str) -> Grade:
        """The grade of one response of int32 [R] token ids; errors as in `grade`."""
        assert self._decodes, "the pool was made without a decoder"
        assert tokens.dtype == "int32" and tokens.ndim == 1, (tokens.dtype, tokens.shape)
        return await self._put("tokens", tokens, answer)

    def _put(self, kind: str, body: bytes | np.ndarray, answer: str) -> asyncio.Future[Grade]:
        job = _Job(kind=kind, body=body, answer=answer, grade=asyncio.get_running_loop().create_future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the grading pool is closed")
            self._jobs.put(job)
        return job.grade

    def close(self) -> None:
        """Kill the workers; grades still waited for raise RuntimeError. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for grader in self._graders:
                self._jobs.put(None)
                grader.stop()
        for grader in self._graders:
            grader.thread.join()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One response: its text in UTF-8, or its token ids as they came, copied only to be sent."""

    kind: str
    body: bytes | np.ndarray
    answer: str
    grade: asyncio.Future[Grade]

    def settle(self, outcome: Grade | BaseException) -> None:
        """Called from any thread: wake whoever waits for the grade."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
            self.grade.get_loop().call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: Grade | BaseException) -> None:
        if self.grade.done():  # cancelled meanwhile
            return
        if isinstance(outcome, BaseException):
            self.grade.set_exception(outcome)
        else:
            self.grade.set_result(outcome)


class _Stopped(Exception):
    """The pool was closed while this grader worked."""


class _Grader:
    """A thread and the process it keeps alive."""

    def __init__(
        self,
        verifier: str,
        decoder: DecoderSource | None,
        timeout_s: float,
        jobs: queue.SimpleQueue[_Job | None],
        log: _FirstOfEach,
    ) -> None:
        self._verifier, self._decoder, self._timeout_s = verifier, decoder, timeout_s
        self._jobs, self._log = jobs, log
        self._lock = threading.Lock()  # guards _worker and _stopped between this thread and stop()
        self._worker: _Worker | None = None
        self._stopped = False
        self.ready: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, name="grading", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Called from outside: make the thread's wait fail at once. Only the thread kills, so no process is
        killed twice.
        """
        with self._lock:
            self._stopped = True
            if self._worker is not None:
                self._worker.hang_up()

    def _run(self) -> None:
        try:
            self._start()
            self.ready.set_result(None)
        except BaseException as error:
            self.ready.set_exception(error)
        while (job := self._jobs.get()) is not None:
            if job.grade.cancelled():
                continue
            try:
                job.settle(self._grade(job))
            except _Stopped:
                job.settle(RuntimeError("the grading pool was closed before this response was graded"))
            except BaseException as error:
                job.settle(error)
            del job  # the thread may wait for the next one for long: let go of the tokens
        self._discard()

    def _grade(self, job: _Job) -> Grade:
        worker = self._living_worker()
        try:
            worker.send([job.kind, job.answer], job.body, self._timeout_s)
            return self._read(worker.receive(self._timeout_s))
        except TimeoutError:
            self._discard()
            self._log.warn(
                "timeout",
                f"a grade took longer than reward.timeout_s={self._timeout_s}, answer {job.answer!r}",
            )
            return _TIMEOUT
        except (EOFError, ConnectionError):
            status = self._discard()
            if self._stopped:
                raise _Stopped from None
            self._log.warn(
                "crash", f"verifier {self._verifier!r} ended its worker ({status}), answer {job.answer!r}"
            )
            return _ERROR

    def _read(self, reply: bool | str) -> Grade:
        if isinstance(reply, str):
            self._log.warn("exception", f"verifier {self._verifier!r} failed:\n{reply}")
            return _ERROR
        return Grade(correct=reply, outcome="graded")

    def _living_worker(self) -> _Worker:
        if self._worker is not None and self._worker.process.poll() is not None:
            self._discard()  # killed from outside between two responses: no response is to blame
        if self._worker is None:
            self._start()
        assert self._worker is not None
        return self._worker

    def _start(self) -> None:
        with self._lock:
            if self._stopped:
                raise _Stopped
            self._worker = _Worker()
        library, source = (self._decoder.library, self._decoder.body) if self._decoder else (None, b"")
        try:
            self._worker.send([self._verifier, library], source, START_TIMEOUT_S)
            refusal = self._worker.receive(START_TIMEOUT_S)
        except (TimeoutError, EOFError, ConnectionError) as error:
            status = self._discard()
            if self._stopped:
                raise _Stopped from None
            raise RuntimeError(
                f"the grading worker for {self._verifier!r} did not start ({error!r}, {status})"
            ) from error
        if refusal is not None:
            self._discard()
            raise UserError(refusal)

    def _discard(self) -> str:
        with self._lock:
            worker, self._worker = self._worker, None
        return worker.kill() if worker is not None else "no worker"


class _Worker:
    """One process and the socket to it; see `worker.py` for what they say to each other."""

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
            # Its own session: Ctrl-C is the trainer's to handle, and what the verifier starts is killed with
            # it.
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        self._lines = self._socket.makefile("rb")

    def send(self, head: list[str | None], body: bytes | np.ndarray, timeout_s: float) -> None:
        header = json.dumps(head).encode()
        data = body if isinstance(body, bytes) else body.tobytes()
        self._socket.settimeout(timeout_s)
        self._socket.sendall(b"".join((SIZES.pack(len(header), len(data)), header, data)))

    def receive(self, timeout_s: float):
        self._socket.settimeout(timeout_s)
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the worker closed its socket")
        return json.loads(line)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> str:
        """End the process and all it started; how it ended, in words."""
        self.hang_up()
        died_by_itself = _wait(self.process, 0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._lines.close()
        self._socket.close()
        return f"exit status {self.process.returncode}" if died_by_itself else "killed"


def _wait(process: subprocess.Popen, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class _FirstOfEach:
    """Logs the first message of each kind, so that ten thousand equal failures are one line; the
    grades say how many.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def warn(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._seen:
                return
            self._seen.add(kind)
        logger.warning("%s (not trained on; later ones are counted, not logged)", message)
