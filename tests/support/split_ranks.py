"""Ranks of a context-parallel group as threads of this process, for functions that add up over
`TokenInputs.sample_group`: no processes, no gloo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

T = TypeVar("T")


class ThreadGroup:
    """Stands for a process group in `all_reduce`, `get_rank` and `get_world_size`."""

    def __init__(self, size: int) -> None:
        self.size, self.own = size, threading.local()
        self.barrier, self.shared = threading.Barrier(size, timeout=20), [torch.empty(0)] * size

    def all_reduce(self, tensor: torch.Tensor, group: Any = None) -> None:
        self.shared[self.own.rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(torch.stack(self.shared).sum(0))
        self.barrier.wait()


def on_threads(monkeypatch: pytest.MonkeyPatch, size: int, work: Callable[[int, ThreadGroup], T]) -> list[T]:
    """`work(rank, group)` on every rank at once; results by rank. The first exception is raised."""
    group, results, errors = ThreadGroup(size), [None] * size, []
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: group.own.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: group.size)

    def run(rank: int) -> None:
        group.own.rank = rank
        try:
            results[rank] = work(rank, group)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
