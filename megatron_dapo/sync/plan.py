"""The plan of a weight push: which rank sends which elements of its parameters to which engine worker, when.

What every worker needs (its sink table) is intersected with what every rank holds. The result depends on the
inputs alone, so all ranks and workers that are given the same inputs have the same plan (`Plan.digest`).

A push goes in rounds. In a round every worker receives one chunk: at most `chunk_bytes`, put together in a
staging buffer from one or more messages. The buffer belongs to the worker's *carrier*: the process on its
host that hands the chunk over, which is a policy rank, or the one that serves a host without ranks. What one
message holds lies end to end in the buffer, so it is sent without being copied again.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_dapo.errors import UserError
from megatron_dapo.sync.regions import MappedBox, row_major
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.sync.sources import Holdings

# A message is at most this part of a chunk, so that replicas share the sending evenly and a chunk comes from
# several of them at once.
MESSAGES_PER_CHUNK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process of an engine. `device`: its number among the devices of its host."""

    engine: str
    rank: int
    host: str
    device: int
    table: SinkTable


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements sink.source[sink.start : + sink.size] of the checkpoint and where they go: `offset` bytes into
    the chunk, packed, and from there to the sink's place in the worker's parameter.

    number: in the table's sinks, of the one that `sink` is a part of; None for a tensor that is sent whole.
    """

    sink: Sink
    number: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class Parcel:
    """Copies that the same ranks hold and that are of one type in the engine, end to end in the chunk."""

    holders: tuple[int, ...]
    dtype: str  # what the sender casts to
    offset: int  # bytes, in the chunk
    num_bytes: int
    copies: tuple[Copy, ...]


Chunk = tuple[Parcel, ...]
Carrier = int | str  # a policy rank, or the name of a host without ranks, for the process that serves it


@dataclass(frozen=True, slots=True)
class Message:
    """A parcel on its way from policy rank `source` to the carrier of worker number `worker`. The two may be
    one rank.
    """

    source: int
    worker: int
    parcel: Parcel


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """carriers: by worker. rounds: the messages of each round, by worker and in the order in which they fill
    its chunk.
    """

    workers: tuple[Worker, ...]
    rank_hosts: tuple[str, ...]
    carriers: tuple[Carrier, ...]
    rounds: tuple[tuple[Message, ...], ...]

    @property
    def messages(self) -> Iterator[Message]:
        return itertools.chain.from_iterable(self.rounds)

    def goes_far(self, message: Message) -> bool:
        """Whether the message goes to another host."""
        return self.rank_hosts[message.source] != self.workers[message.worker].host

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan: equal on all ranks, or they do not have the same inputs."""
        numbers: dict[int, int] = {}
        parcels: list[Parcel] = []
        rounds = []
        for messages in self.rounds:
            rows = []
            for message in messages:
                number = numbers.setdefault(id(message.parcel), len(parcels))
                if number == len(parcels):
                    parcels.append(message.parcel)
                rows.append((message.source, message.worker, number))
            rounds.append(rows)
        content = {
            "workers": [(w.engine, w.rank, w.host, w.device) for w in self.workers],
            "rank_hosts": self.rank_hosts,
            "carriers": self.carriers,
            "parcels": [_content(parcel) for parcel in parcels],
            "rounds": rounds,
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def make_plan(
    workers: Sequence[Worker],
    held: Holdings,
    rank_hosts: Sequence[str],
    *,
    chunk_bytes: int,
    dtype: str,
) -> Plan:
    """The plan for `workers`, with rank r of the policy on the host rank_hosts[r].

    Each message comes from the carrier itself if it holds what is sent, else from a rank of its host that
    does, else from any; of several equally near from the one that has the fewest bytes to send so far.
    `dtype`: of tensors that engines load whole (SinkTable.whole). UserError when no rank holds what an
    engine needs.
    """
    chunks = _chunks_by_worker(workers, held, chunk_bytes, dtype)
    carriers = tuple(_carrier(worker, rank_hosts) for worker in workers)
    sources = _Sources(rank_hosts)
    rounds = []
    for number in range(max(map(len, chunks), default=0)):
        messages = []
        for w, worker in enumerate(workers):
            for parcel in chunks[w][number] if number < len(chunks[w]) else ():
                source = sources.choose(parcel, carriers[w], worker.host)
                messages.append(Message(source, w, parcel))
        rounds.append(tuple(messages))
    return Plan(workers=tuple(workers), rank_hosts=tuple(rank_hosts), carriers=carriers, rounds=tuple(rounds))


class _Sources:
    """Chooses who sends a parcel; remembers how much each rank has to send so far."""

    def __init__(self, rank_hosts: Sequence[str]) -> None:
        self._hosts = rank_hosts
        self._sent = [0] * len(rank_hosts)
        self._nearest: dict[tuple[tuple[int, ...], Carrier], Sequence[int]] = {}

    def choose(self, parcel: Parcel, carrier: Carrier, host: str) -> int:
        key = (parcel.holders, carrier)
        if (nearest := self._nearest.get(key)) is None:
            own = [rank for rank in parcel.holders if rank == carrier]
            near = [rank for rank in parcel.holders if self._hosts[rank] == host]
            nearest = self._nearest[key] = own or near or parcel.holders
        source = min(nearest, key=lambda rank: (self._sent[rank], rank))
        self._sent[source] += parcel.num_bytes
        return source


def _carrier(worker: Worker, rank_hosts: Sequence[str]) -> Carrier:
    """The rank with the worker's device, where its host has as many ranks; where it has fewer they take
    turns, and where it has none the host carries.
    """
    ranks = [rank for rank, host in enumerate(rank_hosts) if host == worker.host]
    return ranks[worker.device % len(ranks)] if ranks else worker.host


# --- the chunks of one worker -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sink, or a part of one, that the same ranks hold. `number`: as in Copy."""

    sink: Sink
    number: int | None
    holders: tuple[int, ...]
    dtype: str
    num_bytes: int


def _chunks_by_worker(
    workers: Sequence[Worker], held: Holdings, chunk_bytes: int, dtype: str
) -> list[list[Chunk]]:
    """For each worker; those with equal tables get the same list."""
    made: list[tuple[SinkTable, list[Chunk]]] = []

    def chunks_of(table: SinkTable) -> list[Chunk]:
        for other, chunks in made:
            if table is other or table == other:
                return chunks
        made.append((table, _chunks(table, held, chunk_bytes, dtype)))
        return made[-1][1]

    return [chunks_of(worker.table) for worker in workers]


def _chunks(table: SinkTable, held: Holdings, chunk_bytes: int, dtype: str) -> list[Chunk]:
    largest_item = max(map(item_bytes, {dtype, *table.dtypes.values()}))
    if chunk_bytes < largest_item:
        raise UserError(
            f"chunk_bytes={chunk_bytes} is less than an element of {largest_item} bytes; raise it"
        )
    message_bytes = max(chunk_bytes // MESSAGES_PER_CHUNK, largest_item)
    modules = _modules(_pieces(table, held, dtype, message_bytes))
    return [tuple(_parcels(chunk, message_bytes)) for chunk in _cut(modules, chunk_bytes)]


def _pieces(table: SinkTable, held: Holdings, dtype: str, limit: int) -> Iterator[_Piece]:
    """What the table's sinks have in common with what ranks hold, none larger than `limit` bytes."""
    whole = [(None, _whole(name, held)) for name in table.whole]
    for number, sink in (*enumerate(table.sinks), *whole):
        to = dtype if number is None else table.dtypes[sink.parameter]
        item_size, found, wanted = item_bytes(to), 0, MappedBox(sink.start, sink.size)
        for part in held.get(sink.source, ()):
            if box := part.box.common(wanted):
                found += math.prod(box.size)
                for piece in _split(sink.part(box.start, box.size), limit // item_size):
                    yield _Piece(piece, number, part.ranks, to, math.prod(piece.size) * item_size)
        if found != math.prod(sink.size):
            raise UserError(
                f"the engines need {sink.source}[{sink.start} + {sink.size}] for {sink.parameter}, of which "
                f"the policy's ranks hold {found} of {math.prod(sink.size)} elements; engines and policy "
                f"must be of the same model (model.path)"
            )


def _whole(name: str, held: Holdings) -> Sink:
    """A sink for all of a Hugging Face tensor, contiguous, under its own name."""
    parts = held.get(name, ())
    shape = tuple(
        max(part.box.start[dim] + part.box.size[dim] for part in parts)
        for dim in range(len(parts[0].box.size) if parts else 0)
    )
    return Sink(name, name, (0,) * len(shape), shape, 0, row_major(shape))


def _split(sink: Sink, limit: int) -> Iterator[Sink]:
    """The sink in parts of at most `limit` elements: cut along its first dimensions."""
    if math.prod(sink.size) <= limit:
        yield sink
        return
    dim = next(d for d, extent in enumerate(sink.size) if extent > 1)
    step = max(1, limit // math.prod(sink.size[dim + 1 :]))
    for begin in range(0, sink.size[dim], step):
        start, size = list(sink.start), list(sink.size)
        start[dim] += begin
        size[dim] = min(step, sink.size[dim] - begin)
        yield from _split(sink.part(tuple(start), tuple(size)), limit)


def _modules(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    """The pieces by module of the engine, and the modules in an order that takes from all holders at the same
    pace: in every round all pipeline stages have something to send.
    """
    by_module: dict[str, list[_Piece]] = {}
    for piece in pieces:
        by_module.setdefault(piece.sink.parameter.rpartition(".")[0], []).append(piece)
    modules = list(by_module.values())
    sizes = [sum(piece.num_bytes for piece in module) for module in modules]
    totals, places = collections.Counter[tuple[int, ...]](), []
    for (first, *_), size in zip(modules, sizes, strict=True):
        places.append(totals[first.holders] + size / 2)
        totals[first.holders] += size
    shares = [place / totals[module[0].holders] for place, module in zip(places, modules, strict=True)]
    return [modules[i] for i in sorted(range(len(modules)), key=lambda i: (shares[i], i))]


def _cut(modules: Iterable[Sequence[_Piece]], limit: int) -> Iterator[list[_Piece]]:
    """Chunks of at most `limit` bytes. A module comes in one chunk where it fits in one: the engine processes
    it when it is complete.
    """
    chunk: list[_Piece] = []
    used = 0
    for module in modules:
        whole = sum(piece.num_bytes for piece in module)
        if chunk and used + whole > limit and whole <= limit:
            yield chunk
            chunk, used = [], 0
        for piece in module:
            if used + piece.num_bytes > limit:
                yield chunk
                chunk, used = [], 0
            chunk.append(piece)
            used += piece.num_bytes
    if chunk:
        yield chunk


def _parcels(chunk: Sequence[_Piece], limit: int) -> Iterator[Parcel]:
    """The chunk's pieces by holders and type, in parcels of at most `limit` bytes. Larger elements come
    first, so that all are aligned without gaps.
    """
    groups: dict[tuple[tuple[int, ...], str], list[_Piece]] = {}
    for piece in chunk:
        groups.setdefault((piece.holders, piece.dtype), []).append(piece)
    end = 0
    for (holders, dtype), group in sorted(groups.items(), key=lambda item: -item_bytes(item[0][1])):
        first, copies = end, []
        for piece in group:
            if end + piece.num_bytes - first > limit:
                yield Parcel(holders, dtype, first, end - first, tuple(copies))
                first, copies = end, []
            copies.append(Copy(piece.sink, piece.number, end))
            end += piece.num_bytes
        yield Parcel(holders, dtype, first, end - first, tuple(copies))


def item_bytes(dtype: str) -> int:
    """Bytes of an element, by the name of torch's type."""
    return getattr(torch, dtype).itemsize


def _content(parcel: Parcel) -> tuple[object, ...]:
    """What distinguishes a parcel, for the digest."""
    copies = [
        (s.parameter, s.source, s.start, s.size, s.offset, s.stride, copy.number, copy.offset)
        for copy in parcel.copies
        for s in (copy.sink,)
    ]
    return (parcel.dtype, parcel.offset, parcel.num_bytes, copies)
