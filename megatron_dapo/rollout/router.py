"""Which replica takes which request, and when: no replica gets more sequences than it runs at once, the
others wait here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_dapo.rollout.replica import Replica, ReplicaState


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for room on a replica, preferably on none of `avoid`."""

    sequences: int
    avoid: Collection[str]
    granted: asyncio.Future[Replica]


class Router:
    """The queue in front of the replicas, and what waits for a change of any of them.

    weights_needed is set while requests wait that only a weight push can help: no replica holds the weights
    that may be sampled from, and one is up with others. While `paused` no request is let through.
    """

    def __init__(self, replicas: Sequence[Replica], max_concurrency: int) -> None:
        self.weights_needed = asyncio.Event()
        self.paused = False
        self._replicas, self._max_concurrency = replicas, max_concurrency
        self._waiting: deque[_Waiting] = deque()
        self._first: deque[_Waiting] = deque()  # are served before those in `_waiting`
        self._changes: set[asyncio.Future[None]] = set()  # one for each `until` that waits
        self._fatal: BaseException | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._first) + len(self._waiting)

    async def acquire(self, sequences: int, avoid: Collection[str], *, first: bool = False) -> Replica:
        """A replica with room for `sequences` more, which counts them as its own until `release`. `first`:
        the queue of the others is behind it.
        """
        if self._fatal is not None:
            raise self._fatal
        waiting = _Waiting(sequences, avoid, asyncio.get_running_loop().create_future())
        queue = self._first if first else self._waiting
        if avoid:
            queue.appendleft(waiting)  # it was sent before and failed
        else:
            queue.append(waiting)
        self.dispatch()
        try:
            replica = await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.done() and not waiting.granted.cancelled():
                waiting.granted.result().unsent -= sequences
                self.release(waiting.granted.result(), sequences)
            self.dispatch()
            raise
        replica.unsent -= sequences  # the caller sends them before anything else runs
        return replica

    def release(self, replica: Replica, sequences: int) -> None:
        replica.in_flight -= sequences
        self.dispatch()
        self.notify()

    def dispatch(self) -> None:
        """Give room to the requests that wait, the longest first. To be called whenever there may be more of
        it.
        """
        while (queue := self._first or self._waiting) and not self.paused:
            waiting = queue[0]
            if not waiting.granted.done():
                replica = self._replica_for(waiting)
                if replica is None:
                    break
                replica.in_flight += waiting.sequences
                replica.unsent += waiting.sequences
                waiting.granted.set_result(replica)
            queue.popleft()
        states = {replica.state for replica in self._replicas if not replica.leaving}
        serving = states & {ReplicaState.READY, ReplicaState.DRAINING}
        waits = bool(self._first or self._waiting)
        if waits and not self.paused and not serving and ReplicaState.STALE in states:
            self.weights_needed.set()
        else:
            self.weights_needed.clear()

    def end(self, error: BaseException) -> None:
        """No request can be answered any more: all that wait, and all that come, raise `error`."""
        self._fatal = self._fatal or error
        while queue := self._first or self._waiting:
            waiting = queue.popleft()
            if not waiting.granted.done():
                waiting.granted.set_exception(self._fatal)
        self.notify()

    async def until(self, holds: Callable[[], bool], *, raise_the_end: bool = True) -> None:
        """Wait until `holds()`, which is asked again after every `notify`. With `raise_the_end`, raise what
        `end` was called with instead.
        """
        while not holds():
            if raise_the_end and self._fatal is not None:
                raise self._fatal
            change = asyncio.get_running_loop().create_future()
            self._changes.add(change)
            try:
                await change
            finally:
                self._changes.discard(change)

    def notify(self) -> None:
        """A replica has changed."""
        for change in self._changes:
            if not change.done():
                change.set_result(None)

    def _replica_for(self, waiting: _Waiting) -> Replica | None:
        """The least loaded that is ready and has room; one that the request failed on only if there is no
        other.
        """
        ready = [replica for replica in self._replicas if replica.state is ReplicaState.READY]
        ready = [replica for replica in ready if replica.name not in waiting.avoid] or ready
        least = min(ready, key=lambda replica: replica.load(), default=None)
        if least is None or (least.load() and least.load() + waiting.sequences > self._max_concurrency):
            return None
        return least
