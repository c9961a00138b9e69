"""The trainer's side of a weight push without a trainer: plans of one rank, and chunks in a file in shared
memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file

from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.sync.manifest import Checksum, Manifest, Piece
from megatron_dapo.sync.plan import Parcel, Plan, Worker, make_plan
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import Held, Holdings

CHUNK_BYTES = 50_000  # less than the layers of the tests' models: they come in parts
GAP = 64  # bytes before every chunk: none begins at a page


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a one-file checkpoint, in a fixed order."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


async def push(
    engine: EngineClient, tensors: Mapping[str, torch.Tensor], version: int, chunk_bytes: int = CHUNK_BYTES
) -> None:
    """A whole update, verified."""
    plan = await plan_for(engine, tensors, chunk_bytes)
    await engine.start_weight_update()
    await send(engine, plan, tensors, version)
    await engine.finish_weight_update(str(version))


async def plan_for(
    engine: EngineClient, tensors: Mapping[str, torch.Tensor], chunk_bytes: int = CHUNK_BYTES
) -> Plan:
    """By the sink tables that the engine tells, and uses from then on."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    answers = await engine.sink_tables(shapes, dtype_of(tensors))
    tables = [SinkTable.from_json(answer) for answer in answers]
    return one_rank_plan(tables, halves(tensors), dtype_of(tensors), chunk_bytes)


async def send(
    engine: EngineClient,
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    version: int,
    names: Collection[str] | None = None,
) -> None:
    """Chunk after chunk. names: the tensors that are sent; all if None."""
    for manifests in staged(plan, tensors, version, names=names):
        await engine.update_weights([manifest.to_json() for manifest in manifests])


def one_rank_plan(tables: Sequence[SinkTable], held: Holdings, dtype: str, chunk_bytes: int) -> Plan:
    """For one engine with these workers, from a policy of one rank on its host."""
    workers = [
        Worker(engine="engine", rank=rank, host="here", device=rank, table=table)
        for rank, table in enumerate(tables)
    ]
    return make_plan(workers, held, ["here"], chunk_bytes=chunk_bytes, dtype=dtype)


def halves(tensors: Mapping[str, torch.Tensor]) -> Holdings:
    """As if rank 0 held every tensor in two parts."""
    held = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        cut = shape[0] // 2
        boxes = [((0,), cut), ((cut,), shape[0] - cut)]
        rest = (0,) * (len(shape) - 1)
        held[name] = tuple(Held(MappedBox(at + rest, (n, *shape[1:])), (0,)) for at, n in boxes if n)
    return held


def dtype_of(tensors: Mapping[str, torch.Tensor]) -> str:
    [dtype] = {tensor.dtype for tensor in tensors.values()}
    return str(dtype).removeprefix("torch.")


def staged(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    version: int,
    *,
    names: Collection[str] | None = None,
    verify: bool = True,
) -> Iterator[list[Manifest]]:
    """Round after round, the manifests by worker; then the memory becomes NaN, since the engine may not look
    at it any more.
    """
    sizes = [sum(message.parcel.num_bytes + GAP for message in messages) for messages in plan.rounds]
    with file_in_memory() as path:
        os.truncate(path, max(sizes) + GAP * len(plan.workers))
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        for messages in plan.rounds:
            manifests, end = [], 0
            for number, worker in enumerate(plan.workers):
                parcels = [message.parcel for message in messages if message.worker == number]
                pieces, checksums, chunk = packed(parcels, tensors, names)
                begin = end + GAP
                end = begin + len(chunk)
                memory[begin:end] = chunk
                manifests.append(
                    Manifest(
                        version=version,
                        table=worker.table.digest,
                        path=str(path),
                        offset=begin,
                        num_bytes=len(chunk),
                        dtype_whole=dtype_of(tensors),
                        pieces=tuple(pieces),
                        checksums=tuple(checksums) if verify else (),
                    )
                )
            yield manifests
            torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)  # NaN in fp32 and in bf16


def packed(
    parcels: Sequence[Parcel],
    tensors: Mapping[str, torch.Tensor],
    names: Collection[str] | None,
) -> tuple[list[Piece], list[Checksum], bytes]:
    """A worker's chunk, without the tensors that are not in `names`."""
    pieces, checksums, chunk = [], [], bytearray()
    for parcel in parcels:
        begin = len(chunk)
        for copy in parcel.copies:
            sink = copy.sink
            if names is not None and sink.source not in names:
                continue
            source = sink.source if copy.number is None else None
            pieces.append(
                Piece(sink=copy.number, source=source, start=sink.start, size=sink.size, offset=len(chunk))
            )
            box = tuple(slice(a, a + n) for a, n in zip(sink.start, sink.size, strict=True))
            values = tensors[sink.source][box].to(getattr(torch, parcel.dtype))
            chunk += values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = xxhash.xxh3_64_hexdigest(chunk[begin:])
        checksums.append(Checksum(offset=begin, num_bytes=len(chunk) - begin, xxh3=digest))
    return pieces, checksums if chunk else [], bytes(chunk)


@contextmanager
def file_in_memory() -> Iterator[Path]:
    """An empty file in /dev/shm, removed at the end."""
    handle, name = tempfile.mkstemp(dir="/dev/shm", prefix="megatron_dapo_test_")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
