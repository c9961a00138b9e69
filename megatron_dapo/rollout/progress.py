"""Is a server that has requests getting on? Read from what vLLM counts about itself (`GET /metrics`).

A total time-out would punish long responses and long queues. What tells a working server from a hung one is
that its counters move: tokens generated, prompt tokens read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

GENERATED, PROMPT = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """tokens: generated or read since the server started. sequences: that run or wait in it now."""

    tokens: int
    sequences: int


def parse_load(text: str) -> ServerLoad | None:
    """The load, from Prometheus' text format, of all engines of a server; None without these counters."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name in (GENERATED, PROMPT, RUNNING, WAITING):
            sums[name] = sums.get(name, 0.0) + float(rest.rpartition(" ")[2])
    if GENERATED not in sums:
        return None
    return ServerLoad(
        tokens=int(sums[GENERATED] + sums.get(PROMPT, 0.0)),
        sequences=int(sums.get(RUNNING, 0.0) + sums.get(WAITING, 0.0)),
    )


class ProgressClock:
    """How long a server that has requests has made no token. Times are seconds of one monotonic clock."""

    def __init__(self, now: float) -> None:
        """The first request goes out now."""
        self._tokens: int | None = None
        self._moved_at = now

    def observe(self, tokens: int | None, now: float) -> None:
        """The counter as it is now; None if the server did not answer, which is no progress."""
        if tokens is not None and tokens != self._tokens:
            self._tokens, self._moved_at = tokens, now

    def answered(self, now: float) -> None:
        """A request was answered, which is progress too."""
        self._moved_at = now

    def without_progress(self, now: float) -> float:
        """Seconds since the last progress."""
        return now - self._moved_at


class InFlight:
    """The requests in flight of one client, all of which can be ended with an error at once."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._errors: dict[asyncio.Task[Any], Exception] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request of the current task. If `end` is called meanwhile, this raises its error."""
        task = asyncio.current_task()
        assert task is not None and task not in self._tasks, "one request at a time in a task"
        cancels = task.cancelling()
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            error = self._errors.get(task)
            if error is None or task.uncancel() > cancels:  # the caller's own cancellation goes first
                raise
            raise error from None
        finally:
            self._tasks.discard(task)
            self._errors.pop(task, None)

    def end(self, error: Exception) -> None:
        """End every request that is in flight now."""
        for task in self._tasks - self._errors.keys():
            self._errors[task] = error
            task.cancel()
