"""Moving the policy's weights off its ranks: buckets of Hugging Face tensors in memory shared by the processes of one host.

Every rank of the first replica copies its own slices straight to where they stand in the Hugging Face tensor,
so nothing is gathered. Publishing to engines and exporting a checkpoint are two readers of the same buckets.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.bridge import hf
from megatron_dapo.bridge.names import hf_shapes, row_of
from megatron_dapo.bridge.plan import Piece, pieces
from megatron_dapo.policy.model import gather_weights, named_shards
from megatron_dapo.policy.parallel import Place

ALIGNMENT = 64  # bytes; vectorised copies like it


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One Hugging Face tensor inside a bucket."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A filled bucket: `path` can be opened by every process of this host and user; `tensors` are views of it."""

    path: str
    dtype: str
    entries: tuple[Entry, ...]
    tensors: dict[str, torch.Tensor]

    def update_info(self, version: int) -> dict[str, Any]:
        """The body of the engines' weight-update call (bridge/vllm_engine.py reads it)."""
        rows = [[e.name, self.dtype, list(e.shape), e.offset] for e in self.entries]
        return {"path": self.path, "tensors": rows, "version": version}


def plan_buckets(shapes: dict[str, tuple[int, ...]], item_size: int, bucket_bytes: int) -> list[tuple[Entry, ...]]:
    """Tensors in checkpoint order, cut into buckets of at most `bucket_bytes` (one tensor may exceed it alone)."""
    buckets: list[list[Entry]] = [[]]
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_size
        if buckets[-1] and offset + size > bucket_bytes:
            buckets.append([])
            offset = 0
        buckets[-1].append(Entry(name=name, shape=shape, offset=offset))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return [tuple(bucket) for bucket in buckets]


class WeightBuckets:
    """The policy's weights as a re-iterable stream of buckets. Collective: every rank iterates, in step.

    ValueError when the ranks are on more than one host.
    """

    def __init__(self, chunks: Sequence[Any], model: hf.HFModel, place: Place, dtype: str, bucket_bytes: int = 1 << 30) -> None:
        self._chunks, self._place, self._dtype = chunks, place, dtype
        torch_dtype = hf.DTYPES[dtype]
        self._plan = plan_buckets(hf_shapes(model), torch_dtype.itemsize, bucket_bytes)
        bucket_of = {entry.name: number for number, bucket in enumerate(self._plan) for entry in bucket}
        self._writes: list[list[tuple[torch.Tensor, Piece]]] = [[] for _ in self._plan]
        for name, parameter in named_shards(chunks):
            row = row_of(name)
            shards = place.shards(expert=row.expert)
            if not shards.first_replica or (row.split == "replicated" and shards.rank > 0):
                continue  # one copy is enough
            if model.tied and name == "output_layer.weight":
                continue  # the last stage's copy of the embedding
            for piece in pieces(name, model, tp=shards.size, tp_rank=shards.rank):
                self._writes[bucket_of[piece.hf]].append((parameter, piece))
        last = [bucket[-1] for bucket in self._plan]
        size = max(entry.offset + math.prod(entry.shape) * torch_dtype.itemsize for entry in last)
        self._path, self._memory = _shared_memory(size, place)

    def __iter__(self) -> Iterator[Bucket]:
        """Fill one bucket after another. A bucket may be overwritten once the next one is asked for."""
        gather_weights(self._chunks)
        for entries, writes in zip(self._plan, self._writes, strict=True):
            bucket = Bucket(path=self._path, dtype=self._dtype, entries=entries, tensors=self._views(entries))
            with torch.no_grad():
                for parameter, piece in writes:
                    target = bucket.tensors[piece.hf].narrow(piece.dim, piece.hf_start, piece.size)
                    target.copy_(parameter.narrow(piece.dim, piece.start, piece.size))
            dist.barrier(group=self._place.control)
            yield bucket
            dist.barrier(group=self._place.control)

    def export(self, folder: Path, source: Path) -> None:
        """Write a Hugging Face checkpoint with the tokenizer and configuration of `source`; whole or not at all."""
        writer = self._place.rank == 0
        temporary = folder.with_name(folder.name + ".tmp")
        if writer:
            temporary.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for number, bucket in enumerate(self, 1):
            if writer:
                file = hf.write_shard(temporary, number, bucket.tensors)
                weight_map |= dict.fromkeys(bucket.tensors, file)
                total += sum(t.numel() * t.itemsize for t in bucket.tensors.values())
        if writer:
            hf.finish_checkpoint(temporary, source, weight_map, total, self._dtype)
            hf.replace_folder(temporary, folder)
        dist.barrier(group=self._place.control)

    def _views(self, entries: tuple[Entry, ...]) -> dict[str, torch.Tensor]:
        dtype = hf.DTYPES[self._dtype]
        return {
            e.name: torch.frombuffer(self._memory, dtype=dtype, count=math.prod(e.shape), offset=e.offset).view(e.shape)
            for e in entries
        }


def _shared_memory(size: int, place: Place) -> tuple[str, mmap.mmap]:
    """Anonymous memory of rank 0, mapped by all ranks through /proc: it is gone with its last process, even after kill -9."""
    told: list[Any] = [None]
    if place.rank == 0:
        descriptor = os.memfd_create("megatron_dapo_weights")
        os.ftruncate(descriptor, size)
        told = [f"/proc/{os.getpid()}/fd/{descriptor}"]
    dist.broadcast_object_list(told, src=0, group=place.control)
    try:
        with open(told[0], "r+b") as file:
            return told[0], mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ValueError(
            f"rank {place.rank} cannot map rank 0's shared memory {told[0]} ({error}); policy ranks on several hosts are not supported yet"
        ) from error
