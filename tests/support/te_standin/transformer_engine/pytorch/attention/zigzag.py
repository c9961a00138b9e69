"""Which tokens of packed sequences a context-parallel rank holds."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..distributed import gather, size_of


def places(bounds: list[int], cp: int, rank: int) -> torch.Tensor:
    """Of each sequence's 2 cp chunks, number `rank` and its mirror image: places among all packed tokens."""
    if cp == 1:
        return torch.arange(bounds[-1])
    parts = []
    for start, end in itertools.pairwise(bounds):
        assert (end - start) % (2 * cp) == 0, f"sequence of {end - start} tokens is no multiple of 2 x {cp}"
        size = (end - start) // (2 * cp)
        parts += [
            torch.arange(start + chunk * size, start + (chunk + 1) * size)
            for chunk in (rank, 2 * cp - 1 - rank)
        ]
    return torch.cat(parts)


def collect(x: torch.Tensor, bounds: list[int], group: Any) -> torch.Tensor:
    """All ranks' tokens [T, ...], in the order of the packed sequences."""
    if size_of(group) == 1:
        return x
    order = torch.cat([places(bounds, group.size(), rank) for rank in range(group.size())]).argsort()
    return gather(x, group)[order]
