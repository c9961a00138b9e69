"""The exchange of a weight push: round after round, every engine worker's chunk is put together in memory
that the worker can map.

The memory is that of the worker's carrier: a rank of the policy on the worker's host, or the process that
serves a host without ranks. Ranks of this host write what they send straight into it, cast to the engine's
type; other ranks send it packed, over gloo. There is room for every chunk twice: the engines read one round
while the next one is staged.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.layout import round_up
from megatron_dapo.sync.chunks import checksum, manifests, pack
from megatron_dapo.sync.host_link import HostLinks
from megatron_dapo.sync.manifest import Checksum, Manifest
from megatron_dapo.sync.plan import Carrier, Message, Plan, Worker, make_plan
from megatron_dapo.sync.sources import Holdings, LocalWeights
from megatron_dapo.sync.staging_memory import StagingMemory, map_memory

SEND_BUFFERS = 2  # of one message each: while one is under way to another host the next is packed


class Exchange:
    """Transport (sync/transport.py) for engines on the hosts of the policy's ranks and on others.

    control: a gloo group of all ranks. hosts: by rank, the name of its host. held: what every rank holds.
    chunk_bytes: of one worker in one round, at most. dtype: of tensors that engines load whole, as torch
    names it. store: of the run, without prefixes, for hosts without ranks; timeout_s: how long one of them
    may let a rank wait.
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
        store: Any = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._rank, self._control, self._hosts = rank, control, tuple(hosts)
        self._held, self._chunk_bytes, self._dtype = held, chunk_bytes, dtype
        self._store, self._timeout_s = store, timeout_s
        self._staging: _Staging | None = None
        self._manifests: list[list[Manifest]] = []  # on rank 0, by round and worker
        self.lost: dict[str, str] = {}

    @property
    def extra_bytes(self) -> int:
        """What this rank keeps for pushes: its workers' chunks, and messages to other hosts."""
        return self._staging.num_bytes if self._staging else 0

    def set_workers(self, workers: Sequence[Worker]) -> None:
        """Collective, see Transport. UserError, on every rank, for a worker that needs what no rank holds,
        and when a rank cannot map the memory of another one of its host.
        """
        if self._staging and self._staging.plan.workers == tuple(workers):
            return
        if self._staging:
            dist.barrier(group=self._control)  # rank 0 is here, so the engines have read what was staged
            self._staging.close()
            self._staging = None  # the old memory is gone before there is new memory
        plan = make_plan(workers, self._held, self._hosts, chunk_bytes=self._chunk_bytes, dtype=self._dtype)
        self._staging = _Staging(plan, self._rank, self._control, self._store, self._timeout_s)
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
        self.lost = {}
        following -= self._leave_out(staging.connect(following))
        for number, of_all in enumerate(staging.plan.rounds):
            if not any(message.worker in following for message in of_all):
                return  # nor in later rounds: a worker's chunks come in the first ones
            dist.barrier(group=self._control)  # rank 0 has asked for the round, so its buffer is free
            checksums = staging.fill(number, following, weights, verify)
            if verify:
                checksums = _gathered(checksums, self._control)
            following -= self._leave_out(staging.settle())  # the whole round is staged
            found: dict[str, list[Manifest]] = {}
            for w in sorted(following, key=lambda w: workers[w].rank) if self._rank == 0 else ():
                manifest = replace(
                    self._manifests[number][w],
                    version=version,
                    path=staging.place(number, w)[0],
                    checksums=tuple(checksums.get(w, ())),
                )
                found.setdefault(workers[w].engine, []).append(manifest)
            yield found

    def _leave_out(self, hosts: Mapping[str, str]) -> set[int]:
        """The workers on these hosts; their engines are lost, for the reasons given."""
        assert self._staging is not None
        left_out = {n for n, carrier in enumerate(self._staging.plan.carriers) if carrier in hosts}
        for worker in (self._staging.plan.workers[number] for number in left_out):
            self.lost[worker.engine] = hosts[worker.host]
        return left_out


class _Staging:
    """The memory of a plan as one rank has it: what it carries, what it writes to on others of its host, and
    the links to hosts without ranks.

    A carrier's memory is two buffers, each with room for one chunk of every worker that it carries.
    """

    def __init__(self, plan: Plan, rank: int, control: Any, store: Any, timeout_s: float) -> None:
        """Collective."""
        self.plan, self._rank, self._control = plan, rank, control
        self._carriers = plan.carriers
        self._starts, self._buffer_bytes = _places(plan)
        self._own: StagingMemory | None = None
        self._memory: dict[int, torch.Tensor] = {}  # by rank
        made = self._on_all_ranks(self._make)
        assert len({digest for _, digest in made}) == 1, "every rank is given the same workers"
        self._paths = [path for path, _ in made]  # by rank
        self._on_all_ranks(self._map)
        sizes = {host: 2 * size for host, size in self._buffer_bytes.items() if isinstance(host, str)}
        self._links = HostLinks(plan, rank, control, store, sizes=sizes, timeout_s=timeout_s)
        far = [m.parcel.num_bytes for m in plan.messages if m.source == rank and plan.goes_far(m)]
        self._send_buffers = [torch.empty(max(far), dtype=torch.uint8) for _ in far[:SEND_BUFFERS]]

    @property
    def num_bytes(self) -> int:
        own = 2 * self._buffer_bytes.get(self._rank, 0)
        return own + sum(buffer.nbytes for buffer in self._send_buffers)

    def close(self) -> None:
        """Memory that engines have mapped is freed when they unmap it."""
        self._links.close()
        self._release()

    def place(self, number: int, worker: int) -> tuple[str, int]:
        """The file that holds the worker's chunk of round `number`, and the byte at which it begins. The file
        on a host without ranks is not known before `connect`.
        """
        carrier = self._carriers[worker]
        path = self._links.path(carrier) if isinstance(carrier, str) else self._paths[carrier]
        return path, self._begin(number, worker)

    # --- a push -----------------------------------------------------------------------------

    def connect(self, workers: Collection[int]) -> dict[str, str]:
        """Have the hosts without ranks ready that carry for these workers. Returns those that cannot be had,
        and why. Collective.
        """
        return self._links.connect(self._far_hosts(workers))

    def fill(
        self, number: int, workers: Collection[int], weights: LocalWeights, verify: bool
    ) -> dict[int, list[Checksum]]:
        """This rank's part of round `number` for these workers: what it sends and what it receives. The
        checksums of what it sent, by worker, when it is to `verify`.
        """
        checksums: dict[int, list[Checksum]] = {}

        def write(message: Message, target: torch.Tensor) -> None:
            pack(message.parcel, weights, target)
            if verify:
                checksums.setdefault(message.worker, []).append(checksum(message.parcel, target))

        messages = [item for item in enumerate(self.plan.rounds[number]) if item[1].worker in workers]
        receiving = [
            dist.irecv(self._target(number, message), group=self._control, group_src=message.source, tag=tag)
            for tag, message in messages
            if self._carriers[message.worker] == self._rank and self.plan.goes_far(message)
        ]
        mine = [(tag, message) for tag, message in messages if message.source == self._rank]
        sending = self._send(number, [item for item in mine if self.plan.goes_far(item[1])], write)
        for _, message in mine:
            if not self.plan.goes_far(message):
                write(message, self._target(number, message))
        for work in (*sending, *receiving, *self._links.finish(self._far_hosts(workers))):
            work.wait()
        return checksums

    def settle(self) -> dict[str, str]:
        """When every rank has done its part of the round: the hosts without ranks that were lost meanwhile,
        and why. Collective.
        """
        return self._links.agree()

    def _send(
        self,
        number: int,
        tagged: list[tuple[int, Message]],
        write: Callable[[Message, torch.Tensor], None],
    ) -> deque[Any]:
        """Send messages to other hosts; returns what is still under way. The ranks begin with different
        carriers, so that they do not all send to the same one.
        """
        numbers = {carrier: number for number, carrier in enumerate(dict.fromkeys(self._carriers))}
        first = self._rank * len(numbers) // len(self.plan.rank_hosts)
        tagged.sort(key=lambda item: (numbers[self._carriers[item[1].worker]] - first) % len(numbers))
        under_way = deque()
        for count, (tag, message) in enumerate(tagged):
            if len(under_way) == SEND_BUFFERS:
                under_way.popleft().wait()
            buffer = self._send_buffers[count % SEND_BUFFERS][: message.parcel.num_bytes]
            write(message, buffer)
            carrier = self._carriers[message.worker]
            if isinstance(carrier, str):
                begin = self._begin(number, message.worker) + message.parcel.offset
                under_way.append(self._links.send(carrier, begin, buffer))
            else:
                under_way.append(dist.isend(buffer, group=self._control, group_dst=carrier, tag=tag))
        return under_way

    def _far_hosts(self, workers: Collection[int]) -> list[str]:
        """The hosts without ranks that carry for these workers, in the order of the plan."""
        carriers = dict.fromkeys(self._carriers[worker] for worker in sorted(workers))
        return [carrier for carrier in carriers if isinstance(carrier, str)]

    def _begin(self, number: int, worker: int) -> int:
        """The byte in its carrier's memory at which the worker's chunk of round `number` begins."""
        return number % 2 * self._buffer_bytes[self._carriers[worker]] + self._starts[worker]

    def _target(self, number: int, message: Message) -> torch.Tensor:
        """Where the message lies in the memory of its carrier, a rank of this host."""
        carrier = self._carriers[message.worker]
        assert isinstance(carrier, int)
        begin = self._begin(number, message.worker) + message.parcel.offset
        return self._memory[carrier][begin : begin + message.parcel.num_bytes]

    # --- memory that processes of a host share ------------------------------------------

    def _make(self) -> tuple[str, str]:
        """(path of this rank's memory, or nothing if it carries nothing; digest of its plan)."""
        if size := 2 * self._buffer_bytes.get(self._rank, 0):
            self._own = StagingMemory(size)
            self._memory[self._rank] = self._own.bytes
        return self._own.path if self._own else "", self.plan.digest

    def _map(self) -> None:
        """The memory of the other carriers on its host that this rank writes to."""
        mine = [m for m in self.plan.messages if m.source == self._rank and not self.plan.goes_far(m)]
        for carrier in {self._carriers[message.worker] for message in mine} - {self._rank}:
            assert isinstance(carrier, int)
            self._memory[carrier] = map_memory(self._paths[carrier], 2 * self._buffer_bytes[carrier])

    def _release(self) -> None:
        self._memory.clear()
        if self._own is not None:
            self._own.close()

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
                self._release()
                raise UserError(
                    f"rank {rank} cannot share memory with the other processes of host {hosts[rank]}: "
                    f"{failure}; ranks and engines of a host need the same user and the same /proc"
                )
        return [result for result, _ in found]


def _places(plan: Plan) -> tuple[list[int], dict[Carrier, int]]:
    """(by worker, where its chunks begin in a buffer of its carrier; by carrier, the size of a buffer).
    Chunks begin at pages, so that each can be mapped alone.
    """
    largest = [0] * len(plan.workers)
    for messages in plan.rounds:
        for message in messages:
            parcel = message.parcel
            largest[message.worker] = max(largest[message.worker], parcel.offset + parcel.num_bytes)
    starts, sizes = [], dict.fromkeys(plan.carriers, 0)
    for carrier, num_bytes in zip(plan.carriers, largest, strict=True):
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
