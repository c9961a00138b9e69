"""The transport between processes of one host: memory that the policy's ranks and the engines share.

Every rank copies its own slices straight to where they stand in the whole Hugging Face tensors; nothing is
gathered, and the engines read the same bytes.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.chunks import CHUNK_BYTES, cut, parts_by_chunk, region
from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard


class SharedMemory:
    """Transport (sync/transport.py) over one piece of memory, as large as the largest chunk.

    `control` is a gloo group of all ranks. The constructor is collective: rank 0 makes the memory, every rank
    maps it. UserError when a rank is on another host.
    """

    def __init__(
        self, rank: int, control: Any, spec: ModelSpec, dtype: str, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._control, self._dtype = control, dtype
        item_size = DTYPES[dtype].itemsize
        self._plan = cut(hf_shapes(spec), item_size, chunk_bytes)
        last = [chunk[-1] for chunk in self._plan]
        size = max(entry.offset + math.prod(entry.shape) * item_size for entry in last)
        self._path, self._memory = _map_memory_of_rank_0(size, rank, control)

    def chunks(self, shards: Sequence[Shard], version: int) -> Iterator[Manifest]:
        """Fill the memory with one chunk after another. Collective (see Transport)."""
        for entries, parts in zip(self._plan, parts_by_chunk(self._plan, shards), strict=True):
            manifest = Manifest(version=version, path=self._path, dtype=self._dtype, entries=entries)
            tensors = manifest.views(self._memory)
            with torch.no_grad():
                for part in parts:
                    region(tensors, part.slice).copy_(part.values())
            dist.barrier(group=self._control)  # every rank has written its part
            yield manifest
            dist.barrier(group=self._control)  # rank 0 is done with the chunk


def _map_memory_of_rank_0(size: int, rank: int, control: Any) -> tuple[str, mmap.mmap]:
    """Anonymous memory, and the path by which other processes of this host and user can open it.

    The path leads through rank 0's open files, so the memory is gone with its last process, also after
    kill -9.
    """
    paths: list[Any] = [None]
    if rank == 0:
        descriptor = os.memfd_create("megatron_dapo_weights")
        os.ftruncate(descriptor, size)
        paths = [f"/proc/{os.getpid()}/fd/{descriptor}"]
    dist.broadcast_object_list(paths, src=0, group=control)
    [path] = paths
    try:
        with open(path, "r+b") as file:
            return path, mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"rank {rank} cannot map rank 0's shared memory {path} ({error}); policy ranks on several hosts "
            f"are not supported yet"
        ) from error
