"""Which tokens Clip-Cov and KL-Cov hold back (arXiv 2505.22617): those whose log-probability and advantage
covary most, which are what lowers the entropy.

    Cov of a token = (log p - mean of log p) (A - mean of A),  means over the trained tokens of the step

It is taken with the engine's log-probabilities when the step's samples are made: so it depends on the step
alone, not on how its tokens are split over ranks and micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from megatron_dapo.types import Sample, Stream


def with_high_covariance(
    samples: Sequence[Sample], *, rule: Literal["clip", "kl"], share: float, low: float, high: float
) -> list[Sample]:
    """The samples with Stream.HIGH_COVARIANCE: 1 for at most `share` of the trained tokens, 0 for the others.

    'kl': those with the largest covariance. 'clip': drawn from those between `low` and `high`, with a seed
    that the first sample's place in the prompt stream gives.
    """
    mask_T, logprobs_T, advantages_T = (
        torch.cat([getattr(sample, name) for sample in samples])
        for name in ("response_mask", "rollout_logprobs", "advantages")
    )
    logprobs_R, advantages_R = logprobs_T[mask_T].double(), advantages_T[mask_T].double()
    covariance_R = (logprobs_R - logprobs_R.mean()) * (advantages_R - advantages_R.mean())
    count = min(max(1, int(share * len(covariance_R))), len(covariance_R))
    if rule == "kl":
        chosen = covariance_R.topk(count).indices
    else:
        candidates = ((covariance_R > low) & (covariance_R < high)).nonzero().squeeze(1)
        draw = torch.Generator().manual_seed(samples[0].prompt_position)
        chosen = candidates[torch.randperm(len(candidates), generator=draw)[:count]]
    flags_R = torch.zeros(len(covariance_R))
    flags_R[chosen] = 1.0
    flags_T = torch.zeros(len(mask_T))
    flags_T[mask_T] = flags_R
    parts = flags_T.split([len(sample.tokens) for sample in samples])
    return [
        dataclasses.replace(sample, streams={**sample.streams, Stream.HIGH_COVARIANCE: flags_L})
        for sample, flags_L in zip(samples, parts, strict=True)
    ]
