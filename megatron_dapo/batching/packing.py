"""Samples into packed micro-batches of every data-parallel rank, under a token budget. Pure functions.

Each mini-batch (one optimizer update) takes an equal, consecutive share of the samples, so its content
depends on neither layout nor budget. Inside it, `plan` makes the largest cost of a rank small, with as few
micro-batches as it finds:

1. Best fit over all samples says how many micro-batches are enough. Every rank gets the same number of them,
   because the ranks communicate in each.
2. Longest first, each sample goes to the rank with the least cost so far among those with room for it, into
   its emptiest micro-batch. Long samples make the costs unequal; the many short ones that follow make them
   equal again.
3. If a sample finds no room, the same with the fullest micro-batch of the rank that has room, which fits
   tighter. If one still finds none, the ranks share the best fit of step 1, micro-batch by micro-batch.
4. A rank runs its costly micro-batches first: a long one at the end would keep the other pipeline stages
   waiting.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_dapo.errors import UserError
from megatron_dapo.layout import round_up
from megatron_dapo.types import Batch, MiniBatch, Sample, Stream

Ranks = list[list[list[int]]]  # [d][m]: the samples of data-parallel rank d, micro-batch m


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sequence of L tokens costs: `per_token * L + per_pair * L^2`, in any unit. By default its
    tokens.
    """

    per_token: float = 1.0
    per_pair: float = 0.0

    def __post_init__(self) -> None:
        if self.per_token <= 0 or self.per_pair < 0:
            raise ValueError(f"{self} must grow with the length; give per_token > 0 and per_pair >= 0")

    def __call__(self, length: int) -> float:
        return self.per_token * length + self.per_pair * length * length

    @classmethod
    def of_model(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ffn_size: int,
        vocab_size: int,
    ) -> Cost:
        """FLOPs of a forward pass (a backward pass has twice as many) of a decoder with grouped-query
        attention and a gated MLP.

        Two per weight and token; two per head dimension and pair of tokens for each of scores and values,
        half of the pairs being masked.
        """
        attention = hidden_size * head_dim * (2 * num_heads + 2 * num_kv_heads)
        mlp = 3 * hidden_size * ffn_size
        return cls(
            per_token=2.0 * (num_layers * (attention + mlp) + hidden_size * vocab_size),
            per_pair=2.0 * num_layers * num_heads * head_dim,
        )


def pack(
    samples: Sequence[Sample],
    *,
    dp: int,
    num_updates: int,
    max_tokens: int,
    version: int,
    denominator: Callable[[Sequence[Sample]], int],
    cost: Cost = Cost(),
    align: int = 1,
    multiple: int = 1,
    min_micro_batches: int = 1,
) -> Batch:
    """Flatten the samples and plan their micro-batches.

    `version` is that of the weights that will be trained: samples of older weights are not fresh.
    `denominator` says what the loss of a mini-batch's samples is divided by (Objective.denominator).

    `max_tokens` is the budget of one micro-batch, in which every sample occupies its length rounded up to a
    multiple of `align` (context parallelism pads sequences). The micro-batches of a rank number a multiple of
    `multiple` (an interleaved pipeline needs one of its size) and at least `min_micro_batches` (which keeps a
    pipeline filled). UserError when a sample exceeds the budget, ValueError for fewer samples than updates.
    """
    if len(samples) < num_updates:
        raise ValueError(f"{num_updates} updates need at least as many samples, got {len(samples)}")
    padded = [round_up(len(sample.tokens), align) for sample in samples]
    _check_budget(max(padded), align, max_tokens)
    mini_batches, largest, mean, num_bins = [], 0.0, 0.0, 0
    for indices in split_evenly(range(len(samples)), num_updates):
        ranks = plan(
            [padded[i] for i in indices],
            dp=dp,
            max_tokens=max_tokens,
            cost=cost,
            multiple=multiple,
            min_micro_batches=min_micro_batches,
        )
        members = [samples[i] for i in indices]
        mini_batches.append(
            MiniBatch(
                micro_batches=tuple(
                    tuple(tuple(indices[i] for i in micro) for micro in rank) for rank in ranks
                ),
                num_tokens=int(torch.cat([sample.response_mask for sample in members]).sum()),
                denominator=denominator(members),
            )
        )
        costs = [sum(cost(padded[indices[i]]) for micro in rank for i in micro) for rank in ranks]
        largest, mean = largest + max(costs), mean + sum(costs) / dp
        num_bins += dp * len(ranks[0])
    return flatten(
        samples,
        version=version,
        mini_batches=mini_batches,
        imbalance=largest / mean,
        fill=sum(len(sample.tokens) for sample in samples) / (num_bins * max_tokens),
    )


def _check_budget(longest: int, align: int, max_tokens: int) -> None:
    if longest > max_tokens:
        alignment = f", padded to a multiple of {align}" if align > 1 else ""
        raise UserError(
            f"batch.max_tokens={max_tokens} is below the longest sample ({longest} tokens{alignment}); "
            "raise it or lower rollout.max_tokens"
        )


def flatten(
    samples: Sequence[Sample],
    *,
    version: int,
    mini_batches: Sequence[MiniBatch],
    imbalance: float,
    fill: float,
) -> Batch:
    """The samples end to end, with which of them each mini-batch trains on."""
    version_N = torch.tensor([s.weight_version for s in samples], dtype=torch.int64)
    return Batch(
        tokens_T=torch.cat([s.tokens for s in samples]),
        response_mask_T=torch.cat([s.response_mask for s in samples]),
        advantages_T=torch.cat([s.advantages for s in samples]),
        streams={Stream.ROLLOUT_LOGPROBS: torch.cat([s.rollout_logprobs for s in samples])}
        | {name: torch.cat([s.streams[name] for s in samples]) for name in samples[0].streams},
        lengths=tuple(len(s.tokens) for s in samples),
        prompt_N=torch.tensor([s.prompt_position for s in samples], dtype=torch.int64),
        number_N=torch.tensor([s.number for s in samples], dtype=torch.int64),
        seed_N=torch.tensor([-1 if s.seed is None else s.seed for s in samples], dtype=torch.int64),
        version_N=version_N,
        fresh_N=version_N == version,
        mini_batches=tuple(mini_batches),
        imbalance=imbalance,
        fill=fill,
    )


def split_evenly(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Consecutive parts whose sizes differ by at most one."""
    edges = [len(items) * k // parts for k in range(parts + 1)]
    return [items[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def plan(
    lengths: Sequence[int],
    *,
    dp: int,
    max_tokens: int,
    cost: Cost,
    multiple: int = 1,
    min_micro_batches: int = 1,
) -> Ranks:
    """Micro-batches of every rank for samples of these lengths, none of them above `max_tokens`, by the steps
    listed at the top of this file.
    """
    costs = [cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = best_fit(order, lengths, max_tokens)
    count = round_up(max(len(bins), dp * min_micro_batches), dp * multiple) // dp
    rooms = [[max_tokens] * count for _ in range(dp)]
    ranks = (
        share_out(order, lengths, costs, rooms, tight=False)
        or share_out(order, lengths, costs, rooms, tight=True)
        or deal_out(bins, costs, dp=dp, count=count)
    )
    for rank in ranks:
        rank.sort(key=lambda micro: -sum(costs[i] for i in micro))
    return ranks


def share_out(
    order: Sequence[int],
    lengths: Sequence[int],
    costs: Sequence[float],
    rooms: Sequence[Sequence[int]],
    *,
    tight: bool,
) -> Ranks | None:
    """Each sample to the cheapest rank with room for it, into its fullest (`tight`) or emptiest micro-batch
    with room.

    `rooms[d][m]`: tokens that micro-batch m of rank d holds. None if a sample finds no room.
    """
    ranks: Ranks = [[[] for _ in rank] for rank in rooms]
    free = [
        sorted((room, m) for m, room in enumerate(rank)) for rank in rooms
    ]  # stays sorted: the emptiest is last
    cheapest = [(0.0, d) for d in range(len(rooms))]  # stays sorted
    for i in order:
        nth = next((k for k, (_, d) in enumerate(cheapest) if free[d][-1][0] >= lengths[i]), None)
        if nth is None:
            return None
        spent, d = cheapest.pop(nth)
        room, m = free[d].pop(bisect_left(free[d], (lengths[i], 0)) if tight else -1)
        ranks[d][m].append(i)
        insort(free[d], (room - lengths[i], m))
        insort(cheapest, (spent + costs[i], d))
    return ranks


def best_fit(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each sample into the fullest bin with room for it, or into a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and bin, sorted
    for i in order:
        tightest = bisect_left(rooms, (lengths[i], 0))
        if tightest == len(rooms):
            bins.append([])
            rooms.append((max_tokens, len(bins) - 1))  # a new bin has the most room of all
        room, b = rooms.pop(tightest)
        bins[b].append(i)
        insort(rooms, (room - lengths[i], b))
    return bins


def deal_out(bins: Sequence[list[int]], costs: Sequence[float], *, dp: int, count: int) -> Ranks:
    """`count` bins to each rank: of every `dp` bins, costliest first, the costliest goes to the cheapest
    rank.
    """
    priced = [(sum(costs[i] for i in b), b) for b in bins] + [
        (0.0, []) for _ in range(count * dp - len(bins))
    ]
    priced.sort(key=lambda pair: -pair[0])
    ranks: Ranks = [[] for _ in range(dp)]
    spent = [0.0] * dp
    for start in range(0, count * dp, dp):
        for d, (price, b) in zip(
            sorted(range(dp), key=spent.__getitem__), priced[start : start + dp], strict=True
        ):
            ranks[d].append(b)
            spent[d] += price
    return ranks
