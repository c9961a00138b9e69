"""Grading in processes that can be killed: a rule that hangs or crashes costs one answer, never the run.

    with GradingPool("dapo", workers=2, timeout_s=10, decoder=decoder_source(tokenizer)) as pool:
        grade = await pool.grade_tokens(completion.tokens, answer)  # decoded in the worker
        grades = await pool.grade(texts, answer)

Each worker process (`worker.py`) has a thread here that sends it responses, several at once where they are
graded quickly, and waits for its lines, so the event loop of the caller never waits, and any loop will do.
The thread starts its own process and outlives it: the kernel's "die with the parent" follows the thread that
forked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from megatron_dapo.errors import UserError
from megatron_dapo.reward.decoding import DecoderSource
from megatron_dapo.reward.jobs import Call, Grade, Job, Jobs, Outcome, settle
from megatron_dapo.reward.process import WorkerProcess
from megatron_dapo.reward.rules import needs_row
from megatron_dapo.reward.worker import TEXT_ERRORS

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# How long a worker may take to import its rules and load its tokenizer.
START_TIMEOUT_S = 120.0
# A worker is sent as many responses at once as it grades in this time, by those before.
FRAME_S = 0.005
FRAME_MOST = 256


class GradingPool:
    """`workers` processes that apply the rule `verifier`, which decides, and further `rules` (rules.py).

    decoder: where they load the tokenizer from, for `grade_tokens`; None: `grade` alone works.
    A response over `timeout_s`, decoding included, has its worker killed and restarted and counts as
    "timeout"; an exception, a crash, and more memory than `memory_bytes` as "crashed". None of it is a grade,
    and the first of each kind is logged. The constructor waits until the workers are ready and raises
    UserError if they cannot load a rule or the tokenizer.

    A waiting response costs a reference to its tokens: how many wait is bounded by how many are sampled.
    """

    def __init__(
        self,
        verifier: str,
        workers: int,
        timeout_s: float,
        decoder: DecoderSource | None = None,
        *,
        rules: Sequence[str] = (),
        memory_bytes: int = 4 << 30,
    ) -> None:
        if workers < 1:
            raise UserError(f"reward.workers={workers} must be at least 1; raise it")
        if not timeout_s > 0:
            raise UserError(f"reward.timeout_s={timeout_s} must be above 0 seconds; raise it")
        self._decodes = decoder is not None
        self._rules = tuple(rules)
        self._verifier = verifier
        self._jobs = Jobs(workers)
        start = [[verifier, *rules], timeout_s, memory_bytes, decoder.library if decoder else None]
        source = decoder.body if decoder else b""
        log = _FirstOfEach()
        self._graders = [_Grader(start, source, timeout_s, self._jobs, log) for _ in range(workers)]
        try:
            for grader in self._graders:
                grader.ready.result()
        except BaseException:
            self.close()
            raise

    async def grade(
        self,
        responses: Sequence[str],
        answer: str,
        *,
        rule: str | None = None,
        row: Callable[[], Mapping[str, Any]] | None = None,
    ) -> list[Grade]:
        """Grades in the order of the responses. `rule` decides in place of the verifier; `row` makes what
        rules may look at beside the answer, JSON values, and is called if one of them does.

        RuntimeError if the pool is closed or a worker cannot be restarted, UserError if there is no such
        rule.
        """
        bodies = [response.encode(errors=TEXT_ERRORS) for response in responses]
        return await self._put("text", bodies, answer, rule, row)

    async def grade_tokens(
        self,
        tokens: np.ndarray,
        answer: str,
        *,
        rule: str | None = None,
        row: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Grade:
        """The grade of one response of int32 [R] token ids; the rest as in `grade`."""
        assert self._decodes, "the pool was made without a decoder"
        assert tokens.dtype == "int32" and tokens.ndim == 1, (tokens.dtype, tokens.shape)
        return (await self._put("tokens", [tokens], answer, rule, row))[0]

    async def _put(
        self,
        kind: str,
        bodies: Sequence[bytes | np.ndarray],
        answer: str,
        rule: str | None,
        row: Callable[[], Mapping[str, Any]] | None,
    ) -> list[Grade]:
        if not bodies:
            return []
        names = [rule or self._verifier, *self._rules]
        seen = row() if row and any(map(needs_row, names)) else None
        call = Call(kind, answer, names, seen, len(bodies))
        if not self._jobs.put([Job(call, index, body) for index, body in enumerate(bodies)]):
            raise RuntimeError("the grading pool is closed")
        return await call.grades

    def close(self) -> None:
        """Kill the workers; grades still waited for raise RuntimeError. May be called twice."""
        waiting = self._jobs.close()
        for grader in self._graders:
            grader.stop()
        for grader in self._graders:
            grader.thread.join()
        settle((job, RuntimeError(_CLOSED)) for job in waiting)

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_CLOSED = "the grading pool was closed before this response was graded"


class _Stopped(Exception):
    """The pool was closed while this grader worked."""


class _Grader:
    """A thread and the process it keeps alive."""

    def __init__(
        self, start: list[Any], source: bytes, timeout_s: float, jobs: Jobs, log: _FirstOfEach
    ) -> None:
        self._start_head, self._source, self._timeout_s = start, source, timeout_s
        self._jobs, self._log = jobs, log
        self._lock = threading.Lock()  # guards _worker and _stopped between this thread and stop()
        self._worker: WorkerProcess | None = None
        self._stopped = False
        self._seconds = FRAME_S  # a response takes, by the last ones
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
        while jobs := self._jobs.take(max(1, min(FRAME_MOST, int(FRAME_S / self._seconds)))):
            began = time.perf_counter()
            left = deque(jobs)
            try:
                self._grade(left)
            except _Stopped:
                settle((job, RuntimeError(_CLOSED)) for job in left)
            except BaseException as error:
                settle((job, error) for job in left)
            # Quickly down to small frames, slowly up again.
            seconds = (time.perf_counter() - began) / len(jobs)
            self._seconds = max(seconds, 0.75 * self._seconds + 0.25 * seconds)
            del jobs, left  # the thread may wait for the next ones for long: let go of the tokens
        self._discard()

    def _grade(self, left: deque[Job]) -> None:
        """Grade and settle all of `left`, taking away what is settled."""
        worker = self._living_worker()
        try:
            bodies = [job.body if isinstance(job.body, bytes) else job.body.tobytes() for job in left]
            head = [
                [job.call.kind, len(body), job.call.answer, job.call.rules, job.call.row]
                for job, body in zip(left, bodies, strict=True)
            ]
            worker.send(head, bodies, self._timeout_s)
            for replies in worker.replies(len(left), self._timeout_s):
                settle([(left.popleft(), self._read(reply)) for reply in replies])
        except TimeoutError:
            self._discard()
            self._blame(
                left,
                "timeout",
                f"a grade took longer than reward.timeout_s={self._timeout_s}, answer "
                f"{left[0].call.answer!r:.200}",
            )
        except (EOFError, ConnectionError):
            status = self._discard()
            if self._stopped:
                raise _Stopped from None
            self._blame(
                left,
                "crashed",
                f"rule {left[0].call.rules[0]!r} ended its worker ({status}), answer "
                f"{left[0].call.answer!r:.200}",
            )

    def _blame(self, left: deque[Job], outcome: Outcome, message: str) -> None:
        """The first of them has that outcome; the others go back to be graded."""
        self._log.warn(outcome, message)
        settle([(left.popleft(), Grade(outcome))])
        if left and not self._jobs.put(left, first=True):
            raise _Stopped

    def _read(self, reply: Any) -> Grade | BaseException:
        if isinstance(reply, dict):
            return UserError(reply["refused"])
        if isinstance(reply, str):
            self._log.warn("exception", f"a rule failed:\n{reply}")
            return Grade("crashed")
        (decision, score, extracted), *others = reply
        return Grade(decision, score, extracted, tuple(score for _, score, _ in others))

    def _living_worker(self) -> WorkerProcess:
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
            self._worker = WorkerProcess()
        try:
            self._worker.send(self._start_head, [self._source], START_TIMEOUT_S)
            ((refusal,),) = self._worker.replies(1, START_TIMEOUT_S)
        except (TimeoutError, EOFError, ConnectionError) as error:
            status = self._discard()
            if self._stopped:
                raise _Stopped from None
            raise RuntimeError(
                f"the grading worker for {self._start_head[0]} did not start ({error!r}, {status})"
            ) from error
        if refusal is not None:
            self._discard()
            raise UserError(refusal)

    def _discard(self) -> str:
        with self._lock:
            worker, self._worker = self._worker, None
        return worker.kill() if worker is not None else "no worker"


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
