"""Samples of given lengths, and how a trainer without packing lays them out: each padded to the longest of
its micro-batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from megatron_dapo.batching.packing import pack
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Batch, Sample


def make_sample(length: int, chance: random.Random, *, prompt: int | None = None, padded: int = 0) -> Sample:
    """`prompt` tokens (default a quarter of `length`), the response up to `length`, then untrained padding up
    to `padded`.
    """
    prompt = max(1, length // 4) if prompt is None else prompt
    size = max(length, padded)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[prompt:length] = True
    return Sample(
        tokens=torch.tensor([chance.randrange(3, 90) for _ in range(size)], dtype=torch.int32),
        response_mask=mask,
        rollout_logprobs=torch.zeros(size),
        advantages=torch.full((size,), chance.gauss(0.0, 1.0)),
        prompt_position=0,
        number=0,
        weight_version=0,
    )


def padded_batch(
    lengths: Sequence[int],
    budget: int,
    chance: random.Random,
    *,
    prompts: Sequence[int] | None = None,
    ranks: int = 1,
) -> Batch:
    """One update without packing. Each rank gets an equal part of the samples in their order, cut into
    micro-batches of as many samples as the budget holds when each is padded to the longest of them.

    lengths: of prompt and response. prompts: of the prompts alone. budget: tokens of a micro-batch.
    """
    shares = [range(len(lengths) * r // ranks, len(lengths) * (r + 1) // ranks) for r in range(ranks)]
    micro_batches = [_cut(lengths, share, budget) for share in shares]
    longest = {
        i: max(lengths[j] for j in micro) for of_rank in micro_batches for micro in of_rank for i in micro
    }
    samples = [
        make_sample(length, chance, prompt=prompts[i] if prompts else None, padded=longest[i])
        for i, length in enumerate(lengths)
    ]
    batch = pack(
        samples,
        dp=ranks,
        num_updates=1,
        max_tokens=max(budget, *longest.values()),
        version=0,
        denominator=trained_tokens,
    )
    most = max(map(len, micro_batches))
    (mini,) = batch.mini_batches
    mini = dataclasses.replace(
        mini, micro_batches=tuple(tuple(of_rank + [()] * (most - len(of_rank))) for of_rank in micro_batches)
    )
    return dataclasses.replace(batch, mini_batches=(mini,))


def _cut(lengths: Sequence[int], share: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    micro_batches: list[tuple[int, ...]] = [()]
    for index in share:
        members = (*micro_batches[-1], index)
        if micro_batches[-1] and len(members) * max(lengths[i] for i in members) > budget:
            micro_batches.append((index,))
        else:
            micro_batches[-1] = members
    return micro_batches
