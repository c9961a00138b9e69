"""The trainer's side of a weight push without a trainer: checkpoint tensors in a file in shared memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_dapo.rollout.client import EngineClient
from megatron_dapo.sync.chunks import cut
from megatron_dapo.sync.manifest import Manifest

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a one-file checkpoint, in a fixed order."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


async def push(
    engine: EngineClient, tensors: dict[str, torch.Tensor], version: int, chunk_bytes: int = 50_000
) -> None:
    """A whole update."""
    await engine.start_weight_update()
    await send(engine, tensors, version, chunk_bytes)
    await engine.finish_weight_update(str(version))


async def send(
    engine: EngineClient, tensors: dict[str, torch.Tensor], version: int, chunk_bytes: int = 50_000
) -> None:
    """Chunk after chunk; after each the memory becomes NaN, since the engine may not look at it any more."""
    [dtype] = {tensor.dtype for tensor in tensors.values()}
    plan = cut({name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype.itemsize, chunk_bytes)
    with file_in_memory() as path:
        manifests = [
            Manifest(version=version, path=str(path), dtype=DTYPES[dtype], entries=entries)
            for entries in plan
        ]
        os.truncate(path, max(manifest.num_bytes for manifest in manifests))
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        for manifest in manifests:
            for name, view in manifest.views(memory).items():
                view.copy_(tensors[name])
            await engine.update_weights(manifest.to_json())
            torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)  # NaN in fp32 and in bf16


@contextmanager
def file_in_memory() -> Iterator[Path]:
    """An empty file in /dev/shm, removed at the end."""
    handle, name = tempfile.mkstemp(dir="/dev/shm", prefix="megatron_dapo_test_")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
