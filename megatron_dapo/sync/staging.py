"""The memory of a push's plan as one rank has it, and one rank's part of each round.

A carrier's memory has room for two chunks of every worker that it carries: the engines read one round while
the next one is staged. In a run that sends deltas (delta.py), a worker to which anything comes from other
hosts has a place for the chunk of every round instead, where a delta is applied to what the last push left.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.layout import round_up
from megatron_dapo.sync.chunks import checksum, pack
from megatron_dapo.sync.delta import NOTHING, DeltaError, DeltaSender, Outgoing, Trial, restore
from megatron_dapo.sync.host_link import HostLinks, agreed
from megatron_dapo.sync.manifest import Checksum
from megatron_dapo.sync.plan import Carrier, Message, Plan
from megatron_dapo.sync.sources import LocalWeights
from megatron_dapo.sync.staging_memory import Memory, MemoryKind, OwnMemory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a rank exchanges weights with.

    control: a gloo group of all ranks. data: the group for the weights, which reaches the memory of `memory`:
    that one, or NCCL's. delta: whether only changes go to other hosts; then `memory` is the host's. store: of
    the run, without prefixes, for hosts without ranks; timeout_s: how long one of them may let a rank wait.
    """

    rank: int
    control: Any
    data: Any
    memory: MemoryKind
    delta: bool
    store: Any
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Body:
    """What travels for a message: all of its bytes, or fewer, which are a delta. whole: what they are, or
    become at the other end, with this fingerprint if it is not NOTHING.
    """

    bytes: torch.Tensor
    whole: torch.Tensor
    fingerprint: int = NOTHING


class Staging:
    """What this rank carries, what it writes to on other carriers of its host, and the links to hosts without
    ranks.
    """

    def __init__(self, plan: Plan, means: Means) -> None:
        """Collective. UserError, on every rank, when one cannot map the memory of another one of its host."""
        self.plan, self._means, self._rank = plan, means, means.rank
        self._carriers = plan.carriers
        far = [message for message in plan.messages if plan.goes_far(message)]
        self._delta = DeltaSender() if means.delta else None
        self._trial, self._began, self._seconds = Trial(), 0.0, 0.0  # of the exchange in this push
        self.sent_bytes = 0  # to other hosts, by this rank, in all pushes
        self._places = _Places(plan, {m.worker for m in far} if means.delta else set())
        self._own: OwnMemory | None = None
        self._memory: dict[int, Memory] = {}  # by rank
        made = self._on_all_ranks(self._make)
        assert len({digest for _, digest in made}) == 1, "every rank is given the same workers"
        self._paths = [path for path, _ in made]  # by rank
        self._on_all_ranks(self._map)
        sizes = {host: size for host, size in self._places.sizes.items() if isinstance(host, str)}
        self._links = HostLinks(
            plan, self._rank, means.control, means.store, sizes=sizes, timeout_s=means.timeout_s
        )
        self._outboxes = self._make_outboxes()
        self._damaged: dict[int, str] = {}  # workers whose image is not what was sent, as this rank has seen
        if means.data is not means.control:
            # NCCL asks for all ranks of a group in its first call, and not every rank has messages.
            dist.all_reduce(means.memory.empty(1), group=means.data)

    @property
    def num_bytes(self) -> int:
        """What this rank keeps for pushes."""
        images = self._delta.num_bytes if self._delta else 0
        own = self._places.sizes.get(self._rank, 0)
        return own + images + sum(outbox.nbytes for outbox in self._outboxes.values())

    def close(self) -> None:
        """Collective. Memory of the host that engines have mapped is freed when they unmap it; they do not
        keep a GPU's open between pushes.
        """
        self._links.close()
        self._release()

    def place(self, number: int, worker: int) -> tuple[str, int]:
        """The memory that holds the worker's chunk of round `number`, and the byte at which it begins. The
        memory on a host without ranks is not known before `connect`.
        """
        carrier = self._carriers[worker]
        path = self._links.path(carrier) if isinstance(carrier, str) else self._paths[carrier]
        return path, self._places.begin(number, worker)

    # --- a push -----------------------------------------------------------------------------

    def connect(self, workers: Collection[int]) -> dict[int, str]:
        """Have the hosts without ranks ready that carry for these workers. Returns the workers on those that
        cannot be had, and why. Collective.
        """
        return self._lost(self._links.connect(self._hosts_of(workers)))

    def fill(
        self, number: int, workers: Collection[int], weights: LocalWeights, verify: bool
    ) -> dict[int, list[Checksum]]:
        """This rank's part of round `number` for these workers: what it sends and what it receives. The
        checksums of what it sent, by worker, when it is to `verify`. Collective.
        """
        self._began = time.perf_counter()
        messages = [message for message in self.plan.rounds[number] if message.worker in workers]
        far = [message for message in messages if self.plan.goes_far(message)]
        bodies = self._bodies(far, weights)
        incoming = self._incoming(number, far, bodies)
        under_way = self._send_and_receive(number, far, bodies, incoming)
        mine = [message for message in messages if message.source == self._rank]
        packed = {id(far[tag].parcel): body.whole for tag, body in bodies.items()}
        for message in mine:
            if not self.plan.goes_far(message):
                target = self._target(number, message)
                if (known := packed.setdefault(id(message.parcel), target)) is target:
                    pack(message.parcel, weights, target)
                else:
                    target.copy_(known)
        checksums = _checksums(mine, packed) if verify else {}
        for work in (*under_way, *self._links.finish(self._hosts_of(workers))):
            work.wait()
        for tag, body in incoming.items() if self._delta else ():
            self._restore(far[tag], body)
        return checksums

    def settle(self) -> dict[int, str]:
        """When every rank has done its part of the round: the workers that were lost meanwhile, with their
        host or because a delta went wrong, and why. Collective.
        """
        self._means.memory.synchronize()
        lost = self._links.agree()
        self._seconds += time.perf_counter() - self._began
        if self._delta is None:
            return self._lost(lost)
        damaged = agreed(self._damaged, self._means.control)
        self._damaged = {}
        reasons = {w: f"rank {rank} cannot apply a delta: {reason}" for w, (rank, reason) in damaged.items()}
        return self._lost(lost) | reasons

    def forget(self, workers: Collection[int]) -> None:
        """Send these workers everything the next time."""
        if self._delta:
            self._delta.forget(workers)

    def end_push(self, engines: Collection[str]) -> None:
        """After the last round, with the engines that were not lost: deltas that do not pay are given up.
        Collective.
        """
        seconds, self._seconds = torch.tensor(self._seconds), 0.0
        if self._delta is None:
            return
        dist.broadcast(seconds, group=self._means.control, group_src=0)
        if self._trial.loses(frozenset(engines), seconds.item()):
            self._delta = None
            self._outboxes = self._make_outboxes()
            if self._rank == 0:
                log.warning(f"sync.delta does not pay here ({self._trial}); all weights are sent from now on")

    def _lost(self, hosts: Mapping[str, str]) -> dict[int, str]:
        """By worker on these hosts, why it is lost."""
        return {n: hosts[str(carrier)] for n, carrier in enumerate(self._carriers) if carrier in hosts}

    def _hosts_of(self, workers: Collection[int]) -> list[str]:
        """The hosts without ranks that carry for these workers, in the order of the plan."""
        carriers = dict.fromkeys(self._carriers[worker] for worker in sorted(workers))
        return [carrier for carrier in carriers if isinstance(carrier, str)]

    # --- what goes to other hosts -------------------------------------------------------

    def _bodies(self, far: Sequence[Message], weights: LocalWeights) -> dict[int, _Body]:
        """What this rank sends, by number in `far`. A parcel that goes to several workers is packed once."""
        bodies: dict[int, _Body] = {}
        packed: dict[tuple[bool, int], torch.Tensor] = {}
        changes: dict[int, Outgoing] = {}
        used = dict.fromkeys(self._outboxes, 0)
        for tag, message in enumerate(far):
            if message.source != self._rank:
                continue
            parcel, outbox = message.parcel, self._outbox(message)
            key = outbox, id(parcel)
            if key not in packed:
                packed[key] = self._outboxes[outbox][used[outbox] :][: parcel.num_bytes]
                pack(parcel, weights, packed[key])
                if self._delta:
                    whole = self._trial.sends_whole
                    changes[id(parcel)] = self._delta.take(id(parcel), packed[key], whole=whole)
                else:
                    used[outbox] += parcel.num_bytes
            if self._delta:
                outgoing = changes[id(parcel)]
                body = self._delta.body(message.worker, id(parcel), outgoing)
                bodies[tag] = _Body(body, outgoing.whole, outgoing.fingerprint)
            else:
                bodies[tag] = _Body(packed[key], packed[key])
        return bodies

    def _incoming(self, number: int, far: Sequence[Message], bodies: Mapping[int, _Body]) -> dict[int, _Body]:
        """Room for what this rank receives, by number in `far`. Collective where deltas are sent, since their
        sizes are known to their senders only.
        """
        announced = torch.zeros(len(far), 2, dtype=torch.int64)
        if self._delta:
            for tag, body in bodies.items():
                announced[tag] = torch.tensor([body.bytes.nbytes, body.fingerprint])
            dist.all_reduce(announced, group=self._means.control)
        incoming = {}
        for tag, message in enumerate(far):
            if self._carriers[message.worker] == self._rank:
                target, (size, fingerprint) = self._target(number, message), announced[tag].tolist()
                is_delta = self._delta is not None and size < target.nbytes
                body = self._means.memory.empty(size) if is_delta else target
                incoming[tag] = _Body(body, target, fingerprint)
        return incoming

    def _send_and_receive(
        self, number: int, far: Sequence[Message], bodies: Mapping[int, _Body], incoming: Mapping[int, _Body]
    ) -> list[Any]:
        """Begin to; returns what is under way."""
        operations, under_way = [], []
        for tag in range(len(far)):
            if tag in incoming:
                operations.append((dist.irecv, incoming[tag].bytes, far[tag].source, tag))
        for tag, body in bodies.items():
            carrier = self._carriers[far[tag].worker]
            self.sent_bytes += body.bytes.nbytes
            if isinstance(carrier, str):
                begin, size = self._begin(number, far[tag]), far[tag].parcel.num_bytes
                under_way.append(self._links.send(carrier, begin, size, body.bytes, body.fingerprint))
            else:
                operations.append((dist.isend, body.bytes, carrier, tag))
        # NCCL knows no tags, but takes what two ranks send each other in the order of the plan.
        batch = [
            dist.P2POp(what, body, group=self._means.data, group_peer=peer, tag=tag)
            for what, body, peer, tag in operations
        ]
        return under_way + (dist.batch_isend_irecv(batch) if batch else [])

    def _restore(self, message: Message, body: _Body) -> None:
        try:
            restore(body.bytes, body.whole, body.fingerprint)
        except DeltaError as error:
            self._damaged[message.worker] = str(error)

    def _begin(self, number: int, message: Message) -> int:
        """The byte in its carrier's memory at which the message begins."""
        return self._places.begin(number, message.worker) + message.parcel.offset

    def _target(self, number: int, message: Message) -> torch.Tensor:
        """Where the message lies in the memory of its carrier, a rank of this host."""
        carrier = self._carriers[message.worker]
        assert isinstance(carrier, int)
        begin = self._begin(number, message)
        return self._memory[carrier].bytes[begin : begin + message.parcel.num_bytes]

    def _outbox(self, message: Message) -> bool:
        """In which outbox it is packed. Those for hosts without ranks (True) lie in memory of the host."""
        return isinstance(self._carriers[message.worker], str) and not self._delta

    def _make_outboxes(self) -> dict[bool, torch.Tensor]:
        """Room for what this rank sends in a round; one message of it, where deltas keep all in their own
        memory.
        """
        sizes = {False: 0, True: 0}
        for messages in self.plan.rounds:
            parcels: dict[bool, dict[int, int]] = {False: {}, True: {}}
            for message in messages:
                if message.source == self._rank and self.plan.goes_far(message):
                    parcels[self._outbox(message)][id(message.parcel)] = message.parcel.num_bytes
            for outbox, found in parcels.items():
                size = max(found.values(), default=0) if self._delta else sum(found.values())
                sizes[outbox] = max(sizes[outbox], size)
        to_hosts = torch.empty(sizes[True], dtype=torch.uint8)
        return {False: self._means.memory.empty(sizes[False]), True: to_hosts}

    # --- memory that processes of a host share ------------------------------------------

    def _make(self) -> tuple[str, str]:
        """(path of this rank's memory, or nothing if it carries nothing; digest of its plan)."""
        if size := self._places.sizes.get(self._rank, 0):
            self._own = self._memory[self._rank] = self._means.memory.make(size)
        return self._own.path if self._own else "", self.plan.digest

    def _map(self) -> None:
        """The memory of the other carriers on its host that this rank writes to."""
        mine = [m for m in self.plan.messages if m.source == self._rank and not self.plan.goes_far(m)]
        for carrier in {self._carriers[message.worker] for message in mine} - {self._rank}:
            assert isinstance(carrier, int)
            size = self._places.sizes[carrier]
            self._memory[carrier] = self._means.memory.open(self._paths[carrier], size)

    def _release(self) -> None:
        """Collective: memory of a GPU must not be freed before all others have closed it."""
        self._memory.pop(self._rank, None)
        while self._memory:
            self._memory.popitem()[1].close()
        dist.barrier(group=self._means.control)
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
        dist.all_gather_object(found, (result, error), group=self._means.control)
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                self._release()
                raise UserError(
                    f"rank {rank} cannot share memory with the other processes of host {hosts[rank]}: "
                    f"{failure}; ranks and engines of a host need the same user and the same /proc"
                )
        return [result for result, _ in found]


def _checksums(messages: Sequence[Message], packed: Mapping[int, torch.Tensor]) -> dict[int, list[Checksum]]:
    """By worker. A parcel, which `packed` has by its identity, is read once for all its messages."""
    sums: dict[int, Checksum] = {}
    found: dict[int, list[Checksum]] = {}
    for message in messages:
        parcel = message.parcel
        if id(parcel) not in sums:
            sums[id(parcel)] = checksum(parcel, packed[id(parcel)])
        found.setdefault(message.worker, []).append(sums[id(parcel)])
    return found


class _Places:
    """Where the chunks lie in the memory of their carriers. kept: the workers with a place for each round;
    the other workers' rounds take turns with two. sizes: of the memories, by carrier.

    Chunks begin at pages, so that each can be mapped alone.
    """

    def __init__(self, plan: Plan, kept: Collection[int]) -> None:
        chunks = [[0] * len(plan.workers) for _ in plan.rounds]
        for of_round, messages in zip(chunks, plan.rounds, strict=True):
            for message in messages:
                parcel = message.parcel
                of_round[message.worker] = max(of_round[message.worker], parcel.offset + parcel.num_bytes)
        self.sizes: dict[Carrier, int] = dict.fromkeys(plan.carriers, 0)
        self._begins: list[list[int]] = []  # by worker and round
        for worker, carrier in enumerate(plan.carriers):
            sizes = [round_up(max(of_round[worker], 1), mmap.ALLOCATIONGRANULARITY) for of_round in chunks]
            if worker not in kept:
                sizes = [max(sizes, default=0)] * 2
            begins = [self.sizes[carrier] + sum(sizes[:n]) for n in range(len(sizes))]
            self._begins.append(begins)
            self.sizes[carrier] += sum(sizes)

    def begin(self, number: int, worker: int) -> int:
        """The byte at which the worker's chunk of round `number` begins."""
        begins = self._begins[worker]
        return begins[number % len(begins)]
