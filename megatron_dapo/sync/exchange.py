"""The exchange of a weight push: round after round, every engine worker's chunk is put together in memory
that the worker can map.

The memory is that of the worker's carrier: a rank of the policy on the worker's host, or the process that
serves a host without ranks. Ranks of this host write what they send straight into it, cast to the engine's
type; other ranks send it packed (staging.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_dapo.sync.chunks import manifests
from megatron_dapo.sync.manifest import Checksum, Manifest
from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.sources import Holdings, LocalWeights
from megatron_dapo.sync.staging import Means, Staging


class Exchange:
    """Transport (sync/transport.py) for engines on the hosts of the policy's ranks and on others.

    hosts: by rank, the name of its host. held: what every rank holds. chunk_bytes: of one worker in one
    round, at most. dtype: of tensors that engines load whole, as torch names it.
    """

    def __init__(
        self, means: Means, *, hosts: Sequence[str], held: Holdings, chunk_bytes: int, dtype: str
    ) -> None:
        self._means, self._hosts = means, tuple(hosts)
        self._held, self._chunk_bytes, self._dtype = held, chunk_bytes, dtype
        self._staging: Staging | None = None
        self._manifests: list[list[Manifest]] = []  # on rank 0, by round and worker
        self.lost: dict[str, str] = {}

    @property
    def extra_bytes(self) -> int:
        """What this rank keeps for pushes: its workers' chunks, and what it sends to other hosts."""
        return self._staging.num_bytes if self._staging else 0

    def set_workers(self, workers: Sequence[Worker]) -> None:
        """Collective, see Transport. UserError, on every rank, for a worker that needs what no rank holds,
        and when a rank cannot map the memory of another one of its host.
        """
        if self._staging and self._staging.plan.workers == tuple(workers):
            return
        if self._staging:
            # Rank 0 is here, so the engines have read what was staged.
            dist.barrier(group=self._means.control)
            self._staging.close()
            self._staging = None  # the old memory is gone before there is new memory
        plan = make_plan(workers, self._held, self._hosts, chunk_bytes=self._chunk_bytes, dtype=self._dtype)
        self._staging = Staging(plan, self._means)
        is_first = self._means.rank == 0
        self._manifests = manifests(plan, self._staging.place, self._dtype) if is_first else []

    def rounds(
        self, weights: LocalWeights, version: int, *, engines: Collection[str], verify: bool
    ) -> Iterator[Mapping[str, list[Manifest]]]:
        """Collective, see Transport. `verify`: the manifests carry a checksum of every message."""
        staging, is_first = self._staging, self._means.rank == 0
        assert staging is not None, "set_workers comes first"
        workers = staging.plan.workers
        following = {number for number, worker in enumerate(workers) if worker.engine in engines}
        assert {workers[number].engine for number in following} == set(engines), "engines are the plan's"
        self.lost = {}
        following -= self._leave_out(staging.connect(following))
        for number, of_all in enumerate(staging.plan.rounds):
            if not any(message.worker in following for message in of_all):
                break  # nor in later rounds: a worker's chunks come in the first ones
            dist.barrier(group=self._means.control)  # rank 0 has asked for the round, so its memory is free
            checksums = staging.fill(number, following, weights, verify)
            if verify:
                checksums = _gathered(checksums, self._means.control)
            following -= self._leave_out(staging.settle())  # the whole round is staged
            found: dict[str, list[Manifest]] = {}
            for w in sorted(following, key=lambda w: workers[w].rank) if is_first else ():
                manifest = replace(
                    self._manifests[number][w],
                    version=version,
                    path=staging.place(number, w)[0],
                    checksums=tuple(checksums.get(w, ())),
                )
                found.setdefault(workers[w].engine, []).append(manifest)
            yield found
        staging.end_push({workers[number].engine for number in following})

    def _leave_out(self, lost: Mapping[int, str]) -> set[int]:
        """All workers of the engines of these workers, which are lost for the reasons given."""
        if not lost:
            return set()
        assert self._staging is not None
        workers = self._staging.plan.workers
        for number, reason in lost.items():
            self.lost.setdefault(workers[number].engine, reason)
        left_out = {number for number, worker in enumerate(workers) if worker.engine in self.lost}
        self._staging.forget(left_out)
        return left_out


def _gathered(checksums: dict[int, list[Checksum]], control: Any) -> dict[int, list[Checksum]]:
    """Those of all ranks, on rank 0, in the order of their chunk. Collective."""
    found: list[Any] = [None] * dist.get_world_size(control)
    is_first = dist.get_rank(control) == 0
    dist.gather_object(checksums, found if is_first else None, group=control, group_dst=0)
    by_worker: dict[int, list[Checksum]] = {}
    for of_rank in found if is_first else ():
        for worker, some in of_rank.items():
            by_worker.setdefault(worker, []).extend(some)
    return {w: sorted(some, key=lambda checksum: checksum.offset) for w, some in by_worker.items()}
