"""The tensors of a checkpoint in chunks of bounded size, and which part of each chunk this rank holds.

An export walks over the weights chunk by chunk, in the order of the checkpoint, the same on every rank, so
that no process ever holds the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dapo.weights.slices import Shard, Slice

CHUNK_BYTES = 1 << 30
Shapes = Mapping[str, tuple[int, ...]]  # by name of the Hugging Face tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One slice of a Hugging Face tensor and the parameter of this rank that has its values."""

    parameter: torch.Tensor
    slice: Slice

    def values(self) -> torch.Tensor:
        return self.parameter.narrow(self.slice.dim, self.slice.start, self.slice.size)


def region(tensors: Mapping[str, torch.Tensor], part: Slice) -> torch.Tensor:
    """View of the elements of the whole tensor that the slice covers."""
    return tensors[part.hf].narrow(part.dim, part.hf_start, part.size)


def cut(shapes: Shapes, item_size: int, chunk_bytes: int) -> list[Shapes]:
    """The tensors in their order, in chunks of at most `chunk_bytes`; a tensor that is larger makes a chunk
    alone.
    """
    chunks: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_size
        if chunks[-1] and used + size > chunk_bytes:
            chunks.append({})
            used = 0
        chunks[-1][name] = shape
        used += size
    return list(chunks)


def parts_by_chunk(chunks: Sequence[Shapes], shards: Sequence[Shard]) -> list[list[Part]]:
    """What this rank contributes to each chunk."""
    number_of = {name: number for number, chunk in enumerate(chunks) for name in chunk}
    parts: list[list[Part]] = [[] for _ in chunks]
    for shard in shards:
        for part in shard.slices:
            parts[number_of[part.hf]].append(Part(shard.tensor, part))
    return parts
