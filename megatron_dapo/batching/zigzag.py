"""Context parallelism: which tokens of packed sequences each rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def zigzag(bounds: Sequence[int], cp: int, rank: int) -> torch.Tensor:
    """Which of the packed tokens context-parallel rank `rank` holds, in its order: of each sequence, cut into
    2 cp equal chunks, chunk `rank` and chunk 2 cp - 1 - `rank`. Causal attention then costs every rank the
    same.

    `bounds`: where sequences begin, and the end of the last one.
    """
    if cp == 1:
        return torch.arange(bounds[-1])
    chunks = []
    for start, end in itertools.pairwise(bounds):
        size = (end - start) // (2 * cp)
        for chunk in (rank, 2 * cp - 1 - rank):
            chunks.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.cat(chunks)
