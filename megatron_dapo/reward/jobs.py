"""Responses on their way through the pool: who waits for them, which is next, and what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Outcome = Literal["correct", "wrong", "no_answer", "timeout", "crashed"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "crashed")
_CORRECT = {"correct": True, "wrong": False, "no_answer": False}

FRAME_BYTES = 1 << 20  # of responses that are taken at once


@dataclass(frozen=True, slots=True)
class Grade:
    """One response's grade. A time-out and a crash are none. score: of the rule that decides. extra: scores
    of the further rules, in their order. extracted: what was taken for the response's answer.
    """

    outcome: Outcome
    score: float = 0.0
    extracted: str | None = field(default=None, compare=False)
    extra: tuple[float, ...] = ()

    @property
    def correct(self) -> bool | None:
        """None where there is no grade."""
        return _CORRECT.get(self.outcome)


class Call:
    """What the responses of one call have in common, and the grades that its caller waits for."""

    def __init__(self, kind: str, answer: str, rules: list[str], row: Any, count: int) -> None:
        self.kind, self.answer, self.rules, self.row = kind, answer, rules, row
        self.loop = asyncio.get_running_loop()
        self.grades: asyncio.Future[list[Grade]] = self.loop.create_future()
        self._graded: list[Any] = [None] * count
        self._missing = count

    def set(self, index: int, outcome: Grade | BaseException) -> None:
        if self.grades.done():  # cancelled meanwhile, or failed already
            return
        if isinstance(outcome, BaseException):
            self.grades.set_exception(outcome)
            return
        self._graded[index] = outcome
        self._missing -= 1
        if not self._missing:
            self.grades.set_result(self._graded)


@dataclass(slots=True)
class Job:
    """One response: its text in UTF-8, or its token ids as they came, copied only to be sent."""

    call: Call
    index: int
    body: bytes | np.ndarray


def settle(outcomes: Iterable[tuple[Job, Grade | BaseException]]) -> None:
    """Called from any thread: hand the outcomes to whoever waits for them."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Grade | BaseException]]] = {}
    for job, outcome in outcomes:
        by_loop.setdefault(job.call.loop, []).append((job, outcome))
    for loop, some in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_set, some)


def _set(outcomes: list[tuple[Job, Grade | BaseException]]) -> None:
    for job, outcome in outcomes:
        job.call.set(job.index, outcome)


class Jobs:
    """The responses that wait for a worker, first come, first served."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, jobs: Sequence[Job], *, first: bool = False) -> bool:
        """Add them, at the front if `first`; False if it is closed."""
        with self._changed:
            if self._closed:
                return False
            if first:
                self._waiting.extendleft(reversed(jobs))
            else:
                self._waiting.extend(jobs)
            self._changed.notify(len(jobs))
            return True

    def take(self, most: int) -> list[Job]:
        """The next ones, at most a worker's share of all; waits for one. Empty when it is closed."""
        with self._changed:
            taken: list[Job] = []
            while not taken and not self._closed:
                if not self._waiting:
                    self._changed.wait()
                share, size = 1 + (len(self._waiting) - 1) // self._workers, 0
                while self._waiting and len(taken) < min(most, share) and size < FRAME_BYTES:
                    job = self._waiting.popleft()
                    if not job.call.grades.cancelled():
                        taken.append(job)
                        size += len(job.body)
            return taken

    def close(self) -> list[Job]:
        """Take no more; what still waited."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return waiting
