"""What the policy-gradient objectives share: everything but the term of a token.

    loss = -sum over the tokens that stay in it of weight * (factor * term + extras),  over the denominator

`term` is the kind's own (`Surrogate`). weight and denominator: objectives/aggregation.py. factor: the
correction of the engine-policy mismatch (objectives/mismatch.py). extras: - kl_coef * KL (objectives/kl.py),
+ entropy_coef * entropy, + lambda_lm * log p on correct responses (VAPO, arXiv 2504.05118), - the
penalty of KL-Cov (objectives/covariance.py).

Legend: R response tokens of one micro-batch that this rank predicts. Three policies, three names:
rollout_logprobs (engine), old_logprobs (policy before the first update of the step), logprobs (policy now).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from megatron_dapo.metrics import EffectiveSize, Max, Mean, Metric
from megatron_dapo.objectives.advantages import with_advantages, with_lm_weights
from megatron_dapo.objectives.aggregation import aggregate, denominator_of, sample_sums
from megatron_dapo.objectives.base import LOG_LIMIT, LossTerms, Objective, SumOverRanks, TokenInputs
from megatron_dapo.objectives.covariance import with_high_covariance
from megatron_dapo.objectives.kl import kl_of_tokens, with_kl_in_reward
from megatron_dapo.objectives.mismatch import (
    correct,
    importance_weights,
    mismatch_sums,
    with_second_moment_mask,
)
from megatron_dapo.types import Batch, Group, Sample, Stream

if TYPE_CHECKING:
    from megatron_dapo.config.objective_base import GroupSection, PolicyLossSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a kind makes its terms of, [R] each. logprobs_R and log_ratio_R = log p / p_old carry gradients
    and are 0 for tokens that a mask took out of the loss (not in `stay_R`); |log_ratio_R| is cut at 20.
    """

    logprobs_R: torch.Tensor
    old_R: torch.Tensor
    log_ratio_R: torch.Tensor
    advantages_R: torch.Tensor
    stay_R: torch.Tensor
    inputs: TokenInputs

    def sample_means(self, values_R: torch.Tensor) -> torch.Tensor:
        """For every token the mean over all tokens of its sample that are in the loss: detached. Collective
        where context parallelism splits samples.
        """
        sums_S = sample_sums(torch.where(self.stay_R, values_R, 0.0), self.inputs)
        counts_S = sample_sums(self.stay_R, self.inputs)
        return (sums_S / counts_S.clamp(min=1))[self.inputs.samples_R].to(values_R.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """The term of each token, which is maximised, and bool [R] by the name under which their share of the
    tokens in the loss is reported.
    """

    terms_R: torch.Tensor
    shares: Mapping[str, torch.Tensor] = field(default_factory=dict)


def policy_gradient(config: PolicyLossSection, surrogate: Callable[[Tokens], Surrogate]) -> Objective:
    """The objective with this term of a token, and all else as `config` says. A kind whose section is no
    GroupSection replaces `samples`.
    """
    kl_in_reward = config.kl_coef > 0 and config.kl_in == "reward"
    second_moment = config.mismatch_correction == "second_moment"
    wanted = {
        Stream.OLD_LOGPROBS: True,
        Stream.REFERENCE_LOGPROBS: config.kl_coef > 0,
        Stream.LM_WEIGHTS: config.lambda_lm > 0,
        Stream.HIGH_COVARIANCE: config.covariance != "none",
        Stream.KEPT: second_moment,
    }
    return Objective(
        needs=frozenset(stream for stream, used in wanted.items() if used),
        samples=partial(training_samples, cast("GroupSection", config)),
        denominator=denominator_of(config.aggregation, config.constant_length),
        loss=partial(loss_terms, config, surrogate),
        entropy_gradient=config.entropy_coef != 0,
        prepare=partial(prepare, config) if kl_in_reward or second_moment else None,
        old_before_update=kl_in_reward or second_moment,
    )


def training_samples(config: GroupSection, groups: Sequence[Group]) -> list[Sample]:
    """The groups' samples with their advantages and the streams that `config` asks for."""
    samples = with_advantages(
        groups,
        advantage=config.advantage,
        each_reward=config.normalize_rewards == "each",
        reward_weights=config.reward_weights,
    )
    if config.lambda_lm:
        denominator = denominator_of(config.aggregation, config.constant_length)
        samples = with_lm_weights(samples, groups, denominator)
    if config.covariance != "none":
        samples = with_high_covariance(
            samples,
            rule=config.covariance,
            share=config.covariance_share,
            low=config.covariance_low,
            high=config.covariance_high,
        )
    return samples


def prepare(config: PolicyLossSection, batch: Batch, sum_over_ranks: SumOverRanks) -> Batch:
    """`Objective.prepare`: what needs whole samples or all tokens of the step."""
    if config.kl_coef and config.kl_in == "reward":
        batch = with_kl_in_reward(batch, config.kl_coef)
    if config.mismatch_correction == "second_moment":
        batch = with_second_moment_mask(batch, sum_over_ranks, config.mismatch_moment)
    return batch


def loss_terms(
    config: PolicyLossSection, surrogate: Callable[[Tokens], Surrogate], inputs: TokenInputs
) -> LossTerms:
    """Loss and metrics of one micro-batch.

    Metrics of tokens in the loss: kl_old, the kind's shares and those of the extras. Of all trained tokens,
    masked ones included: entropy, fresh_tokens, masked (shares), kl_k1, kl_k3, ess. Of fresh tokens: gap,
    gap_max.
    """
    old_R, rollout_R = inputs.streams[Stream.OLD_LOGPROBS], inputs.streams[Stream.ROLLOUT_LOGPROBS]
    weights_R = importance_weights(
        old_R,
        rollout_R,
        inputs.samples_R,
        level=config.mismatch_level,
        num_samples=inputs.num_samples,
        group=inputs.sample_group,
    )
    factors_R, stay_R = correct(
        weights_R,
        correction=config.mismatch_correction,
        low=config.mismatch_low,
        high=config.mismatch_high,
        kept_T=inputs.streams.get(Stream.KEPT),
    )
    log_ratio_R = torch.where(stay_R, inputs.logprobs_R - old_R, 0.0)
    tokens = Tokens(
        logprobs_R=torch.where(stay_R, inputs.logprobs_R, 0.0),
        old_R=old_R,
        log_ratio_R=log_ratio_R.clamp(-LOG_LIMIT, LOG_LIMIT),
        advantages_R=inputs.advantages_R,
        stay_R=stay_R,
        inputs=inputs,
    )
    own = surrogate(tokens)
    terms_R, metrics = _with_extras(config, own.terms_R * factors_R, tokens)
    total, excluded = aggregate(
        terms_R,
        stay_R,
        inputs,
        aggregation=config.aggregation,
        constant_length=config.constant_length,
    )
    num_tokens = stay_R.sum()
    metrics |= {name: Mean((share_R & stay_R).sum(), num_tokens) for name, share_R in own.shares.items()}
    metrics |= {"kl_old": Mean(_k3(tokens.log_ratio_R.detach()).sum(), num_tokens)}
    metrics |= _mismatch_metrics(inputs, weights_R, stay_R)
    return LossTerms(loss=-total, num_tokens=num_tokens, excluded=excluded, metrics=metrics)


def _k3(log_ratio_R: torch.Tensor) -> torch.Tensor:
    """KL(old || now) of each token; exactly 0 outside the loss."""
    return log_ratio_R.exp() - 1 - log_ratio_R


def _with_extras(
    config: PolicyLossSection, terms_R: torch.Tensor, tokens: Tokens
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The terms with what `config` adds to those of the kind, and metrics of it."""
    inputs, stay_R = tokens.inputs, tokens.stay_R
    metrics: dict[str, Metric] = {}
    if config.covariance != "none":
        held_R = (inputs.streams[Stream.HIGH_COVARIANCE] != 0) & stay_R
        if config.covariance == "clip":
            terms_R = torch.where(held_R, terms_R.detach(), terms_R)
        else:
            penalty_R = config.covariance_kl_coef * tokens.log_ratio_R.abs()
            terms_R = terms_R - torch.where(held_R, penalty_R, 0.0)
        metrics["high_covariance"] = Mean(held_R.sum(), stay_R.sum())
    if config.kl_coef:
        reference_R = torch.where(stay_R, inputs.streams[Stream.REFERENCE_LOGPROBS], 0.0)
        kl_R = kl_of_tokens(tokens.logprobs_R, reference_R, config.kl_estimator)
        metrics["kl_reference"] = Mean(torch.where(stay_R, kl_R.detach(), 0.0).sum(), stay_R.sum())
        if config.kl_in == "loss":
            terms_R = terms_R - config.kl_coef * kl_R
    if config.entropy_coef:
        terms_R = terms_R + config.entropy_coef * torch.where(stay_R, inputs.entropy_R, 0.0)
    if config.lambda_lm:
        weights_R = inputs.streams[Stream.LM_WEIGHTS]
        terms_R = terms_R + config.lambda_lm * weights_R * tokens.logprobs_R
        correct_R = (weights_R != 0) & stay_R
        nll_R = torch.where(correct_R, -tokens.logprobs_R.detach(), 0.0)
        metrics["lm_loss"] = Mean(nll_R.sum(), correct_R.sum())
    return terms_R, metrics


def _mismatch_metrics(
    inputs: TokenInputs, weights_R: torch.Tensor, stay_R: torch.Tensor
) -> dict[str, Metric]:
    old_R, rollout_R = inputs.streams[Stream.OLD_LOGPROBS], inputs.streams[Stream.ROLLOUT_LOGPROBS]
    gaps = mismatch_sums(old_R, rollout_R, inputs.fresh_R, weights_R, stay_R)
    fresh, num_tokens = inputs.fresh_R.sum(), len(inputs.logprobs_R)
    return {
        "entropy": Mean(inputs.entropy_R.detach().sum(), num_tokens),
        "fresh_tokens": Mean(fresh, num_tokens),
        "kl_k1": Mean(gaps.kl_k1, num_tokens),
        "kl_k3": Mean(gaps.kl_k3, num_tokens),
        "masked": Mean(gaps.masked, num_tokens),
        "gap": Mean(gaps.gap, fresh),
        "gap_max": Max(gaps.gap_max),
        "ess": EffectiveSize(gaps.weights, gaps.squares, num_tokens),
    }
