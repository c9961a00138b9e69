"""The chunks of a weight push: what lies in them and in which order, and what their workers are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xxhash

from megatron_dapo.sync.manifest import Checksum, Manifest, Piece
from megatron_dapo.sync.plan import Parcel, Plan, Worker
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import LocalWeights


@torch.no_grad()
def pack(parcel: Parcel, weights: LocalWeights, target: torch.Tensor) -> None:
    """Cast the parcel's elements to its type and lay them end to end in `target` (bytes)."""
    values = target.view(getattr(torch, parcel.dtype))
    sizes = [copy.sink.num_elements for copy in parcel.copies]
    for copy, place in zip(parcel.copies, values.split(sizes), strict=True):
        sink = copy.sink
        place.view(sink.size).copy_(weights.view(sink.source, sink.start, sink.size))


def checksum(parcel: Parcel, packed: torch.Tensor) -> Checksum:
    digest = xxhash.xxh3_64_hexdigest(packed.numpy().data)
    return Checksum(offset=parcel.offset, num_bytes=parcel.num_bytes, xxh3=digest)


def manifests(plan: Plan, place: Callable[[int, int], tuple[str, int]], dtype: str) -> list[list[Manifest]]:
    """By round and worker; version and checksums are a push's. `place(round, worker)`: the file in which a
    chunk lies, and the byte at which it begins. `dtype`: of tensors sent whole.
    """
    made: list[list[Manifest]] = []
    digests = _digests(plan.workers)
    pieces: dict[int, list[Piece]] = {}  # by parcel, which workers with equal tables have in common
    for number, messages in enumerate(plan.rounds):
        chunks: list[list[Piece]] = [[] for _ in plan.workers]
        num_bytes = [0] * len(plan.workers)
        for message in messages:
            parcel = message.parcel
            if id(parcel) not in pieces:
                pieces[id(parcel)] = _pieces(parcel)
            chunks[message.worker] += pieces[id(parcel)]
            num_bytes[message.worker] += parcel.num_bytes
        made.append([])
        for worker, chunk in enumerate(chunks):
            path, offset = place(number, worker)
            manifest = Manifest(
                version=0,
                table=digests[worker],
                path=path,
                offset=offset,
                num_bytes=num_bytes[worker],
                dtype_whole=dtype,
                pieces=tuple(chunk),
            )
            made[-1].append(manifest)
    return made


def _pieces(parcel: Parcel) -> list[Piece]:
    return [
        Piece(
            sink=copy.number,
            source=copy.sink.source if copy.number is None else None,
            start=copy.sink.start,
            size=copy.sink.size,
            offset=copy.offset,
        )
        for copy in parcel.copies
    ]


def _digests(workers: Sequence[Worker]) -> list[str]:
    """Of the workers' tables; equal ones are digested once."""
    known: list[tuple[SinkTable, str]] = []

    def digest(table: SinkTable) -> str:
        for other, found in known:
            if table is other or table == other:
                return found
        known.append((table, table.digest))
        return known[-1][1]

    return [digest(worker.table) for worker in workers]
