"""A conversion by several processes of this host or by the ranks of torchrun; progress on stderr."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from megatron_dapo.convert.job import Conversion, Job, Share
from megatron_dapo.errors import UserError

_LINE_S = 2.0
_PR_SET_PDEATHSIG = 1


class Progress:
    """Counts bytes and prints a line now and then."""

    def __init__(self, name: str, total: int, every_s: float = _LINE_S) -> None:
        self._name, self._total, self._every = name, max(1, total), every_s
        self._done, self._began = 0, time.monotonic()
        self._printed = self._began

    def set(self, done: int) -> None:
        self._done, now = min(done, self._total), time.monotonic()  # headers do not count
        if now - self._printed >= self._every:
            self._printed = now
            self.print()

    def add(self, count: int) -> None:
        self.set(self._done + count)

    def print(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._began)
        print(
            f"{self._name}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB "
            f"({self._done / self._total:.0%}), {self._done / seconds / 1e9:.2f} GB/s",
            file=sys.stderr,
            flush=True,
        )


def convert(job: Job, workers: int = 1, environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Do the job, or this rank's part of it. Returns the result on rank 0, None on others.

    environment: RANK, WORLD_SIZE and what torchrun tells its ranks, where it started this process.
    """
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    conversion = Conversion(job)
    launch = _launch(environment)
    lock = conversion.start(launch if world > 1 else None)
    try:
        shares = [Share(number=rank * workers + w, of=world * workers) for w in range(workers)]
        total = sum(conversion.share_bytes(share) for share in shares)
        progress = Progress(f"rank {rank}" if world > 1 else job.out.name, total)
        if workers == 1:
            conversion.write_share(shares[0], progress.add)
        else:
            _run_processes(job, shares, progress)
        progress.print()
        conversion.say_done(rank, launch)
        while rank == 0 and not conversion.all_done(world, launch):
            time.sleep(0.2)
        return conversion.finish() if rank == 0 else None
    finally:
        os.close(lock)


def _launch(environment: Mapping[str, str]) -> str:
    """What the ranks of one launch have in common, and another launch has not."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return " ".join(environment.get(name, "") for name in names)


def _run_processes(job: Job, shares: list[Share], progress: Progress) -> None:
    """One process for each share. The first error ends all of them, as the death of this process does."""
    context = multiprocessing.get_context("spawn")
    counts = [context.Value("q", 0) for _ in shares]
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_worker, args=(job, share, count, errors, os.getpid()), daemon=True)
        for share, count in zip(shares, counts, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            progress.set(sum(count.value for count in counts))
            if any(process.exitcode for process in processes):
                break
            processes[0].join(0.1) if processes[0].is_alive() else time.sleep(0.1)
        progress.set(sum(count.value for count in counts))
        if not errors.empty():
            raise UserError(errors.get())
        if failed := [process.exitcode for process in processes if process.exitcode]:
            raise UserError(f"a worker ended with {failed[0]}; start the conversion again, it goes on")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _worker(job: Job, share: Share, count: Any, errors: Any, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before this process asked to die with it
    torch.set_num_threads(1)

    def report(written: int) -> None:
        count.value += written

    try:
        Conversion(job).write_share(share, report)
    except UserError as error:
        errors.put(str(error))
        sys.exit(2)
