"""PPO with a value model (arXiv 1707.06347): the clipped policy loss with an advantage for each token, by GAE
from the values of the text before it, and a loss that fits the values to the returns.

The returns may have a lambda of their own (VC-PPO, arXiv 2503.01491), that of the advantages may depend on
the response's length (VAPO, arXiv 2504.05118).

Legend: T tokens of a part, N its samples, R trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_dapo.metrics import Mean
from megatron_dapo.objectives import gae
from megatron_dapo.objectives.advantages import STD_EPS, make_samples, with_lm_weights
from megatron_dapo.objectives.base import LossTerms, Objective, SumOverRanks
from megatron_dapo.objectives.clipping import clipped
from megatron_dapo.objectives.kl import kl_of_tokens
from megatron_dapo.objectives.mismatch import with_second_moment_mask
from megatron_dapo.objectives.policy_gradient import policy_gradient
from megatron_dapo.types import Batch, Group, Sample, Stream

if TYPE_CHECKING:
    from megatron_dapo.config.objective_models import PpoConfig


def ppo(config: PpoConfig) -> Objective:
    """PPO as the section `objective` of the configuration describes it."""
    of_policy = policy_gradient(config, partial(clipped, config))
    return dataclasses.replace(
        of_policy,
        needs=of_policy.needs | {Stream.VALUES, Stream.RETURNS},
        samples=partial(with_rewards, config, of_policy.denominator),
        prepare=partial(prepare, config),
    )


def with_rewards(
    config: PpoConfig, denominator: Callable[[Sequence[Sample]], int], groups: Sequence[Group]
) -> list[Sample]:
    """Every response as a sample whose advantage is its reward, until the values are known (`with_gae`)."""
    samples = make_samples(
        [
            (group.prompt, completion, reward)
            for group in groups
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
    )
    return with_lm_weights(samples, groups, denominator) if config.lambda_lm else samples


def prepare(config: PpoConfig, part: Batch, sum_over_ranks: SumOverRanks) -> Batch:
    """`Objective.prepare`."""
    part = with_gae(config, part, sum_over_ranks)
    if config.mismatch_correction == "second_moment":
        part = with_second_moment_mask(part, sum_over_ranks, config.mismatch_moment)
    return part


def with_gae(config: PpoConfig, part: Batch, sum_over_ranks: SumOverRanks) -> Batch:
    """The part with advantages and returns instead of rewards."""
    mask_T = part.response_mask_T
    lengths_N = torch.stack([mask.sum() for mask in mask_T.split(list(part.lengths))])
    values_R, rewards_R = part.streams[Stream.VALUES][mask_T].double(), token_rewards(config, part, lengths_N)
    lambdas_N = torch.full((len(lengths_N),), config.gae_lambda, dtype=torch.float64)
    if config.gae_length_alpha is not None:
        lambdas_N = gae.length_adaptive_lambda(lengths_N, config.gae_length_alpha)
    of_returns_N = torch.full_like(lambdas_N, config.value_gae_lambda)
    advantages_R = gae.advantages(rewards_R, values_R, lengths_N, lambdas_N)
    returns_R = values_R + gae.advantages(rewards_R, values_R, lengths_N, of_returns_N)
    if config.advantage == "whitened":
        advantages_R = whitened(advantages_R, sum_over_ranks)
    with_advantages = dataclasses.replace(part, advantages_T=_spread(advantages_R, mask_T))
    return with_advantages.with_stream(Stream.RETURNS, _spread(returns_R, mask_T))


def token_rewards(config: PpoConfig, part: Batch, lengths_N: torch.Tensor) -> torch.Tensor:
    """The response's reward at its last trained token, less the KL of each token with kl_in=reward: float64
    [R]. `part` has the rewards as advantages.
    """
    mask_T, last = part.response_mask_T, gae.last_tokens(lengths_N)
    of_responses_R = part.advantages_T[mask_T].double()
    rewards_R = torch.zeros_like(of_responses_R)
    rewards_R[last] = of_responses_R[last]
    if config.kl_coef and config.kl_in == "reward":
        old_T, reference_T = part.streams[Stream.OLD_LOGPROBS], part.streams[Stream.REFERENCE_LOGPROBS]
        kl_R = kl_of_tokens(old_T[mask_T].double(), reference_T[mask_T].double(), config.kl_estimator)
        rewards_R -= config.kl_coef * kl_R
    return rewards_R


def whitened(values_R: torch.Tensor, sum_over_ranks: SumOverRanks) -> torch.Tensor:
    """(x - mean) / (std + 1e-6) over the float64 values of all data-parallel ranks."""
    own = torch.tensor([float(values_R.sum()), len(values_R)], dtype=torch.float64)
    total, count = sum_over_ranks(own)
    off_R = values_R - total / count.clamp(min=1)
    std = (sum_over_ranks(off_R.square().sum()) / (count - 1).clamp(min=1)).sqrt()
    return off_R / (std + STD_EPS)


def value_terms(
    values_R: torch.Tensor, old_values_R: torch.Tensor, returns_R: torch.Tensor, clip: float | None
) -> LossTerms:
    """Half the squared error of the values that are fitted; where `clip` is given, at least that of a value
    which stays within `clip` of the old one, as PPO's reference code has it.
    """
    errors_R = (values_R - returns_R).square()
    held_R = torch.zeros_like(errors_R, dtype=torch.bool)
    if clip is not None:
        near_R = old_values_R + (values_R - old_values_R).clamp(-clip, clip)
        near_errors_R = (near_R - returns_R).square()
        held_R = near_errors_R > errors_R
        errors_R = torch.maximum(errors_R, near_errors_R)
    num_tokens = torch.tensor(len(values_R))
    return LossTerms(
        loss=0.5 * errors_R.sum(),
        num_tokens=num_tokens,
        excluded=torch.tensor(0),
        metrics={
            "value_mean": Mean(values_R.detach().sum(), num_tokens),
            "value_clip": Mean(held_R.sum(), num_tokens),
            "return_mean": Mean(returns_R.sum(), num_tokens),
        },
    )


def _spread(values_R: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Values of the trained tokens at their places, float32 [T]."""
    values_T = torch.zeros(len(mask_T))
    values_T[mask_T] = values_R.float()
    return values_T
