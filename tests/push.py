"""A trainer's side of a weight update, without a trainer: checkpoint tensors through a file in shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_dapo.rollout.engine import Engine

ALIGNMENT = 64


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a one-file checkpoint, in a fixed order."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


async def push(engine: Engine, tensors: dict[str, torch.Tensor], version: int, bucket_bytes: int = 50_000) -> None:
    """A whole update."""
    await engine.start_weight_update()
    await send(engine, tensors, version, bucket_bytes)
    await engine.finish_weight_update(str(version))


async def send(engine: Engine, tensors: dict[str, torch.Tensor], version: int, bucket_bytes: int = 50_000) -> None:
    """Bucket after bucket; after each the memory is filled with NaN, since the engine may not look at it any more."""
    buckets: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if buckets[-1] and sum(t.nbytes for t in buckets[-1].values()) + tensor.nbytes > bucket_bytes:
            buckets.append({})
        buckets[-1][name] = tensor
    size = max(sum(t.nbytes + ALIGNMENT for t in bucket.values()) for bucket in buckets)
    with shared_memory(size) as (path, fill):
        for bucket in buckets:
            await engine.update_weights({"path": path, "tensors": fill(bucket), "version": version})
            fill({"": torch.full((size // 4,), float("nan"))})


@contextlib.contextmanager
def shared_memory(size: int) -> Iterator[tuple[str, Callable[[dict[str, torch.Tensor]], list]]]:
    """Path of a file in /dev/shm and a function that fills it and returns the rows of the update call."""
    handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="megatron_dapo_test_")
    try:
        os.ftruncate(handle, size)
        with mmap.mmap(handle, size) as memory:

            def fill(tensors: dict[str, torch.Tensor]) -> list:
                rows, offset = [], 0
                for name, tensor in tensors.items():
                    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    memory[offset : offset + len(raw)] = raw
                    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[tensor.dtype]
                    rows.append([name, dtype, list(tensor.shape), offset])
                    offset += -(-len(raw) // ALIGNMENT) * ALIGNMENT
                return rows

            yield path, fill
    finally:
        os.close(handle)
        os.unlink(path)
