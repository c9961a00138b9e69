"""The exchange of a weight push: round after round, every engine worker's chunk is put together in memory
that the worker can map.

The memory is that of the worker's carrier, a rank of the policy on the worker's host. Ranks of this host
write what they send straight into it, cast to the engine's type; other ranks send it packed, over gloo. There
is room for every chunk twice: the engines read one round while the next one is staged.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.layout import round_up
from megatron_dapo.sync.chunks import checksum, manifests, pack
from megatron_dapo.sync.manifest import Checksum, Manifest
from megatron_dapo.sync.plan import Message, Plan, Worker, make_plan
from megatron_dapo.sync.sources import Holdings, LocalWeights

SEND_BUFFERS = 2  # of one message each: while one is under way to another host the next is packed


class Exchange:
    """Transport (sync/transport.py) for engines on the hosts of the policy's ranks.

    control: a gloo group of all ranks. hosts: by rank, the name of its host. held: what every rank holds.
    chunk_bytes: of one worker in one round, at most. dtype: of tensors that engines load whole, as torch
    names it.
    """

    def __init__(
        self,
        *,
        rank: int,
        control: Any,
        hosts: Sequence[str],
        held: Holdings,
        chunk_bytes: int,
        dtype: str,
    ) -> None:
        self._rank, self._control, self._hosts = rank, control, tuple(hosts)
        self._held, self._chunk_bytes, self._dtype = held, chunk_bytes, dtype
        self._staging: _Staging | None = None
        self._manifests: list[list[Manifest]] = []  # on rank 0, by round and worker

    @property
    def extra_bytes(self) -> int:
        """What this rank keeps for pushes: its workers' chunks, and messages to other hosts."""
        return self._staging.num_bytes if self._staging else 0

    def set_workers(self, workers: Sequence[Worker]) -> None:
        """Collective, see Transport. UserError, on every rank, for a worker on a host without ranks, for one
        that needs what no rank holds, and when a rank cannot map the memory of another one of its host.
        """
        if self._staging and self._staging.plan.workers == tuple(workers):
            return
        if self._staging:
            dist.barrier(group=self._control)  # rank 0 is here, so the engines have read what was staged
            self._staging.close()
            self._staging = None  # the old memory is gone before there is new memory
        plan = make_plan(workers, self._held, self._hosts, chunk_bytes=self._chunk_bytes, dtype=self._dtype)
        self._staging = _Staging(plan, self._rank, self._control)
        self._manifests = manifests(plan, self._staging.place, self._dtype) if self._rank == 0 else []

    def rounds(
        self, weights: LocalWeights, version: int, *, engines: Collection[str], verify: bool
    ) -> Iterator[Mapping[str, list[Manifest]]]:
        """Collective, see Transport. `verify`: the manifests carry a checksum of every message."""
        staging = self._staging
        assert staging is not None, "set_workers comes first"
        workers = staging.plan.workers
        following = {number for number, worker in enumerate(workers) if worker.engine in engines}
        assert {workers[number].engine for number in following} == set(engines), "engines are the plan's"
        for number, of_all in enumerate(staging.plan.rounds):
            messages = [message for message in of_all if message.worker in following]
            if not messages:  # nor in later rounds: a worker's chunks come in the first ones
                return
            dist.barrier(group=self._control)  # rank 0 has asked for the round, so its buffer is free
            checksums = staging.fill(number, messages, weights, verify)
            if verify:
                checksums = _gathered(checksums, self._control)
            dist.barrier(group=self._control)  # the whole round is staged
            found: dict[str, list[Manifest]] = {}
            for w in sorted(following, key=lambda w: workers[w].rank) if self._rank == 0 else ():
                manifest = replace(
                    self._manifests[number][w], version=version, checksums=tuple(checksums.get(w, ()))
                )
                found.setdefault(workers[w].engine, []).append(manifest)
            yield found


class _Staging:
    """The memory of a plan as one rank has it: what it carries, and what it writes to on others of its host.

    A rank's memory is two buffers, each with room for one chunk of every worker that it carries.
    """

    def __init__(self, plan: Plan, rank: int, control: Any) -> None:
        """Collective."""
        self.plan, self._rank, self._control = plan, rank, control
        self._carriers = _carriers(plan)
        self._starts, self._buffer_bytes = _places(plan, self._carriers)
        self._descriptor: int | None = None
        self._memory: dict[int, torch.Tensor] = {}  # by rank
        made = self._on_all_ranks(self._make)
        assert len({digest for _, digest in made}) == 1, "every rank is given the same workers"
        self._paths = [path for path, _ in made]  # by rank
        self._on_all_ranks(self._map)
        far = [m.parcel.num_bytes for m in plan.messages if m.source == rank and self._goes_far(m)]
        self._send_buffers = [torch.empty(max(far), dtype=torch.uint8) for _ in far[:SEND_BUFFERS]]

    @property
    def num_bytes(self) -> int:
        return 2 * self._buffer_bytes[self._rank] + sum(buffer.nbytes for buffer in self._send_buffers)

    def close(self) -> None:
        """Memory that engines have mapped is freed when they unmap it."""
        self._memory.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def place(self, number: int, worker: int) -> tuple[str, int]:
        """The file that holds the worker's chunk of round `number`, and the byte at which it begins."""
        carrier = self._carriers[worker]
        return self._paths[carrier], number % 2 * self._buffer_bytes[carrier] + self._starts[worker]

    def fill(
        self, number: int, messages: Sequence[Message], weights: LocalWeights, verify: bool
    ) -> dict[int, list[Checksum]]:
        """This rank's part of round `number`: what it sends and what it receives. The checksums of what it
        sent, by worker, when it is to `verify`.
        """
        checksums: dict[int, list[Checksum]] = {}

        def write(message: Message, target: torch.Tensor) -> None:
            pack(message.parcel, weights, target)
            if verify:
                checksums.setdefault(message.worker, []).append(checksum(message.parcel, target))

        far = [(tag, message) for tag, message in enumerate(messages) if self._goes_far(message)]
        receiving = [
            dist.irecv(self._target(number, message), group=self._control, group_src=message.source, tag=tag)
            for tag, message in far
            if self._carriers[message.worker] == self._rank
        ]
        sending = self._send([(tag, message) for tag, message in far if message.source == self._rank], write)
        for message in messages:
            if message.source == self._rank and not self._goes_far(message):
                write(message, self._target(number, message))
        for work in (*sending, *receiving):
            work.wait()
        return checksums

    def _send(
        self, tagged: list[tuple[int, Message]], write: Callable[[Message, torch.Tensor], None]
    ) -> deque[Any]:
        """Send messages to other hosts; returns what is still under way. Every rank begins with the carriers
        that come after it, so that they do not all send to the same one.
        """
        num_ranks = len(self.plan.rank_hosts)
        tagged.sort(key=lambda item: (self._carriers[item[1].worker] - self._rank) % num_ranks)
        under_way = deque()
        for count, (tag, message) in enumerate(tagged):
            if len(under_way) == SEND_BUFFERS:
                under_way.popleft().wait()
            buffer = self._send_buffers[count % SEND_BUFFERS][: message.parcel.num_bytes]
            write(message, buffer)
            carrier = self._carriers[message.worker]
            under_way.append(dist.isend(buffer, group=self._control, group_dst=carrier, tag=tag))
        return under_way

    def _goes_far(self, message: Message) -> bool:
        hosts = self.plan.rank_hosts
        return hosts[message.source] != hosts[self._carriers[message.worker]]

    def _target(self, number: int, message: Message) -> torch.Tensor:
        """Where the message lies in its carrier's memory."""
        _, begin = self.place(number, message.worker)
        begin += message.parcel.offset
        return self._memory[self._carriers[message.worker]][begin : begin + message.parcel.num_bytes]

    # --- memory that processes of a host share ------------------------------------------

    def _make(self) -> tuple[str, str]:
        """(path of this rank's memory, or nothing if it carries nothing; digest of its plan). The path leads
        through the rank's open files, so the memory is gone with the last process that has it open or mapped,
        also after kill -9.
        """
        path = ""
        if size := 2 * self._buffer_bytes[self._rank]:
            self._descriptor = os.memfd_create("megatron_dapo_weights")
            os.ftruncate(self._descriptor, size)
            path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return path, self.plan.digest

    def _map(self) -> None:
        """This rank's memory, and that of the carriers on its host that it writes to."""
        mine = [m for m in self.plan.messages if m.source == self._rank and not self._goes_far(m)]
        for carrier in {self._rank, *(self._carriers[m.worker] for m in mine)}:
            if not self._paths[carrier]:
                continue
            with open(self._paths[carrier], "r+b") as file:
                memory = mmap.mmap(file.fileno(), 2 * self._buffer_bytes[carrier])
            self._memory[carrier] = torch.frombuffer(memory, dtype=torch.uint8)

    def _on_all_ranks(self, what: Callable[[], Any]) -> list[Any]:
        """What it returns on every rank. UserError on all of them when one fails. Collective."""
        result = error = None
        try:
            result = what()
        except (OSError, ValueError) as caught:  # ValueError: the file is shorter than the mapping
            error = str(caught)
        hosts = self.plan.rank_hosts
        found: list[Any] = [None] * len(hosts)
        dist.all_gather_object(found, (result, error), group=self._control)
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                self.close()
                raise UserError(
                    f"rank {rank} cannot share memory with the other processes of host {hosts[rank]}: "
                    f"{failure}; ranks and engines of a host need the same user and the same /proc"
                )
        return [result for result, _ in found]


def _carriers(plan: Plan) -> tuple[int, ...]:
    """By worker, the rank on its host. UserError where there is none."""
    for worker, carrier in zip(plan.workers, plan.carriers, strict=True):
        if carrier is None:
            raise UserError(
                f"{worker.engine} is on host {worker.host}: engines on hosts without policy ranks are not "
                f"supported yet; start it on one of {', '.join(sorted(set(plan.rank_hosts)))}"
            )
    return tuple(carrier for carrier in plan.carriers if carrier is not None)


def _places(plan: Plan, carriers: Sequence[int]) -> tuple[list[int], list[int]]:
    """(by worker, where its chunks begin in a buffer of its carrier; by rank, the size of a buffer). Chunks
    begin at pages, so that each can be mapped alone.
    """
    largest = [0] * len(carriers)
    for messages in plan.rounds:
        for message in messages:
            parcel = message.parcel
            largest[message.worker] = max(largest[message.worker], parcel.offset + parcel.num_bytes)
    starts, sizes = [], [0] * len(plan.rank_hosts)
    for carrier, num_bytes in zip(carriers, largest, strict=True):
        starts.append(sizes[carrier])
        sizes[carrier] += round_up(max(num_bytes, 1), mmap.ALLOCATIONGRANULARITY)
    return starts, sizes


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
