"""The chunks of a weight push: what lies in them and in which order, and what their workers are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

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
    digest = xxhash.xxh3_64_hexdigest(packed.cpu().numpy().data)
    return Checksum(offset=parcel.offset, num_bytes=parcel.num_bytes, xxh3=digest)


def manifests(plan: Plan, place: Callable[[int, int], tuple[str, int]], dtype: str) -> list[list[Manifest]]:
    """By round and worker; version and checksums are a push's. `place(round, worker)`: the memory in which a
    chunk lies, and the byte at which it begins. `dtype`: of tensors sent whole.
    """
    made: list[list[Manifest]] = []
    digests = _digests(plan.workers)
    # By table and parcels, which workers with equal tables have in common.
    alike: dict[tuple[str, tuple[int, ...]], Manifest] = {}
    for number, messages in enumerate(plan.rounds):
        chunks: list[list[Parcel]] = [[] for _ in plan.workers]
        for message in messages:
            chunks[message.worker].append(message.parcel)
        made.append([])
        for worker, chunk in enumerate(chunks):
            path, offset = place(number, worker)
            key = digests[worker], tuple(map(id, chunk))
            if key not in alike:
                alike[key] = Manifest(
                    version=0,
                    table=digests[worker],
                    path=path,
                    offset=offset,
                    num_bytes=sum(parcel.num_bytes for parcel in chunk),
                    dtype_whole=dtype,
                    pieces=tuple(piece for parcel in chunk for piece in _pieces(parcel)),
                )
            made[-1].append(replace(alike[key], path=path, offset=offset))
    return made


def manifest_bytes(plan: Plan, dtype: str) -> dict[str, int]:
    """What all workers are told in a push without checksums, in bytes of JSON: in the first push, which names
    every piece, and in the later ones.
    """
    told = {"first_push": 0, "later_pushes": 0}
    pieces: dict[int, int] = {}  # bytes that a list takes, by identity: workers with equal tables share lists
    for of_round in manifests(plan, lambda number, worker: ("/proc/1234567/fd/123", 0), dtype):
        for manifest in of_round:
            brief = len(json.dumps(manifest.brief().to_json()))
            if id(manifest.pieces) not in pieces:
                pieces[id(manifest.pieces)] = len(json.dumps(manifest.to_json())) - brief
            told["first_push"] += brief + pieces[id(manifest.pieces)]
            told["later_pushes"] += brief
    return told


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
