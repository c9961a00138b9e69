"""Rank 0's decisions on every rank, without a collective: a collective would end with gloo's or NCCL's
time-out (30 or 10 minutes) while rank 0 waits for a long rollout, an evaluation or engines that load.

Rank 0 puts each value into torchrun's store. The others wait for it in short polls, for hours if need be, and
look between polls whether rank 0 still gives signs of life: a thread of it counts up a number in the store.
"""

from __future__ import annotations

import pickle
import threading
import time
from typing import TypeVar

import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.lifeline import Clocks

T = TypeVar("T")
ALIVE = "megatron_dapo/alive"
SHORTEST_POLL_S = 0.001
POLLS_PER_S = 500  # that the store answers, all ranks together: a percent or two of a core


class RankZeroLost(UserError):
    """Rank 0 ended, stopped or cannot be reached, so nobody decides what comes next."""


class ControlChannel:
    """One per process group. `share` is called by all ranks in the same order.

    store: the default store of torch.distributed. beat_s: how often rank 0 gives a sign of life; silence_s:
    how long the others do without one before they give up. num_ranks: that wait together: few may look often.
    """

    def __init__(
        self,
        rank: int,
        store: dist.Store,
        *,
        num_ranks: int = 2,
        beat_s: float = 5.0,
        silence_s: float = 50.0,
    ) -> None:
        self._rank, self._store = rank, store
        self._longest_poll_s = min(0.1, num_ranks / POLLS_PER_S)
        self._beat_s, self._silence_s = beat_s, silence_s
        self._num_shared = 0
        self._closed = threading.Event()
        if rank == 0:
            store.add(ALIVE, 1)
            beat = threading.Thread(
                target=self._beat, args=(store.clone(),), name="rank 0 is alive", daemon=True
            )
            beat.start()

    def share(self, value: T | None = None) -> T:
        """Rank 0's `value` (anything that pickles, small) on every rank. RankZeroLost when rank 0 is gone."""
        self._num_shared += 1
        key = f"megatron_dapo/shared/{self._num_shared}"
        if self._rank == 0:
            self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
            return value  # type: ignore[return-value]
        try:
            self._wait_for(key)
            return pickle.loads(self._store.get(key))
        except dist.DistNetworkError as error:
            raise RankZeroLost(f"the store of this run cannot be reached any more: {error}") from error

    def leave_it_to_the_lifeline(self, clocks: Clocks) -> None:
        """Give rank 0 up only after the time for which it may hold its interpreter: whatever else can become
        of it, the lifeline notices, and sooner.
        """
        self._silence_s = max(self._silence_s, clocks.held_s + clocks.silence_s)

    def connection(self) -> dist.Store:
        """Another connection to the store, for another thread."""
        return self._store.clone()

    def close(self) -> None:
        """End rank 0's signs of life."""
        self._closed.set()

    def _wait_for(self, key: str) -> None:
        began = heard = checked = time.monotonic()
        signs_of_life = -1
        while not self._store.check([key]):
            now = time.monotonic()
            time.sleep(min(self._longest_poll_s, max(SHORTEST_POLL_S, (now - began) / 20)))
            if now - checked < self._beat_s / 4:
                continue
            checked = now
            if (latest := self._store.add(ALIVE, 0)) != signs_of_life:
                signs_of_life, heard = latest, now
            elif now - heard > self._silence_s:
                raise RankZeroLost(
                    f"rank 0 has given no sign of life for {self._silence_s:g} s; look at its console and "
                    f"host, then "
                    "resume from the last checkpoint with the same command"
                )

    def _beat(self, store: dist.Store) -> None:
        """In a thread of rank 0: it goes on while rank 0's main thread waits for engines, and ends with the
        process.
        """
        while not self._closed.wait(self._beat_s):
            try:
                store.add(ALIVE, 1)
            except RuntimeError:  # the store has ended; so will the run
                return
