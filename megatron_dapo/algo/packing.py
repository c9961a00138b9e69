"""Samples into packed micro-batches of every data-parallel rank, under a token budget. Pure functions.

Each mini-batch (one optimizer update) takes an equal, consecutive share of the samples, so its content depends on neither
layout nor budget. Inside it, samples go to ranks by longest-first to the least loaded rank, then into bins by first-fit
decreasing; every rank gets the same number of micro-batches, because the ranks communicate in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dapo.types import Batch, MiniBatch, Sample


def pack(samples: Sequence[Sample], *, dp: int, num_updates: int, max_tokens: int, min_micro_batches: int = 1) -> Batch:
    """Flatten the samples and plan their micro-batches.

    `max_tokens` is the budget of one micro-batch; `min_micro_batches` keeps a pipeline filled.
    ValueError when a sample exceeds the budget or there are fewer samples than updates.
    """
    if len(samples) < num_updates:
        raise ValueError(f"batch.updates_per_step={num_updates} needs at least as many samples, got {len(samples)}; lower it")
    lengths = tuple(len(sample.tokens) for sample in samples)
    if (longest := max(lengths)) > max_tokens:
        raise ValueError(
            f"batch.max_tokens={max_tokens} is below the longest sample ({longest} tokens); raise it or lower rollout.max_tokens"
        )
    newest = max(sample.weight_version for sample in samples)
    trained = [sum(sample.response_mask) for sample in samples]
    mini_batches = []
    for indices in split_evenly(range(len(samples)), num_updates):
        ranks = assign_ranks(indices, lengths, dp)
        bins = [fill_bins(rank, lengths, max_tokens) for rank in ranks]
        count = max(min_micro_batches, *(len(b) for b in bins))
        mini_batches.append(
            MiniBatch(
                micro_batches=tuple(tuple(spread_bins(b, count)) for b in bins),
                num_tokens=sum(trained[i] for i in indices),
            )
        )
    return Batch(
        tokens_T=torch.tensor([t for s in samples for t in s.tokens], dtype=torch.int64),
        response_mask_T=torch.tensor([m for s in samples for m in s.response_mask], dtype=torch.bool),
        rollout_logprobs_T=torch.tensor([p for s in samples for p in s.rollout_logprobs], dtype=torch.float32),
        advantages_N=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        fresh_N=torch.tensor([s.weight_version == newest for s in samples]),
        lengths=lengths,
        mini_batches=tuple(mini_batches),
    )


def split_evenly(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Consecutive parts whose sizes differ by at most one."""
    edges = [len(items) * k // parts for k in range(parts + 1)]
    return [items[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def assign_ranks(indices: Sequence[int], lengths: Sequence[int], dp: int) -> list[list[int]]:
    """Longest first to the rank with the fewest tokens so far."""
    ranks: list[list[int]] = [[] for _ in range(dp)]
    loads = [0] * dp
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        ranks[rank].append(index)
        loads[rank] += lengths[index]
    return ranks


def fill_bins(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: bins of at most `max_tokens` tokens."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(max_tokens)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def spread_bins(bins: list[list[int]], count: int) -> list[tuple[int, ...]]:
    """Exactly `count` bins: the fullest ones (by samples) are halved while there are too few; the rest stay empty."""
    bins = [list(b) for b in bins]
    while len(bins) < count and bins and len(max(bins, key=len)) > 1:
        fullest = max(bins, key=len)
        half = len(fullest) // 2
        bins.append(fullest[half:])
        del fullest[half:]
    bins += [[] for _ in range(count - len(bins))]
    return [tuple(b) for b in bins]
