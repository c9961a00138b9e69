"""DPO (arXiv 2305.18290) on the best and the worst response of each group.

    loss of a pair = -log sigmoid(m)
    m = beta (sum over y_w of log p / p_ref - sum over y_l of log p / p_ref)

The two responses of a pair may lie in different micro-batches and on different ranks. So margins are
computed before the update (`with_margins`), and each token of the preferred response y_w is trained with the
weight beta sigmoid(-m), each of the other with its negative: that is the gradient of the loss at these
weights, exact for one update.

Legend: T tokens of a part, R of one micro-batch, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from megatron_dapo.metrics import Max, Mean
from megatron_dapo.objectives.advantages import make_samples
from megatron_dapo.objectives.aggregation import sample_sums
from megatron_dapo.objectives.base import LossTerms, Objective, SumOverRanks, TokenInputs
from megatron_dapo.types import Batch, Group, Sample, Stream

if TYPE_CHECKING:
    from megatron_dapo.config.objective_models import DpoConfig


# Pairs are told apart by the positions of their prompts modulo this: those of a step are near each other.
NUM_SLOTS = 1 << 20


def dpo(config: DpoConfig) -> Objective:
    """DPO as the section `objective` of the configuration describes it."""
    return Objective(
        needs=frozenset({Stream.OLD_LOGPROBS, Stream.REFERENCE_LOGPROBS, Stream.MARGINS}),
        samples=best_and_worst,
        denominator=num_pairs,
        loss=partial(dpo_terms, config.beta),
        prepare=partial(with_margins, config.beta),
        old_before_update=True,
    )


def best_and_worst(groups: Sequence[Group]) -> list[Sample]:
    """Of each group the response with the highest reward (advantage 1) and that with the lowest (-1), the
    first of equal ones; none of a group whose rewards are all alike. Responses that are not trained on take
    no part.

    A step without a pair has one sample without a trained token: there is nothing to update.
    """
    responses = []
    for group in groups:
        pairs = zip(group.rewards, group.completions, strict=True)
        trained = [(reward, completion) for reward, completion in pairs if completion.trained.any()]
        if not trained:
            continue
        best, worst = max(trained, key=lambda pair: pair[0]), min(trained, key=lambda pair: pair[0])
        if best[0] > worst[0]:
            responses += [(group.prompt, best[1], 1.0), (group.prompt, worst[1], -1.0)]
    if not responses:
        prompt, completion = groups[0].prompt, groups[0].completions[0]
        (sample,) = make_samples([(prompt, completion, 0.0)])
        sample.response_mask.zero_()
        return [sample]
    return make_samples(responses)


def num_pairs(samples: Sequence[Sample]) -> int:
    """At least 1."""
    return max(1, len(samples) // 2)


def with_margins(beta: float, part: Batch, sum_over_ranks: SumOverRanks) -> Batch:
    """The part with the margin of its pair at each token."""
    old_T, reference_T = (part.streams[s].double() for s in (Stream.OLD_LOGPROBS, Stream.REFERENCE_LOGPROBS))
    signed_T = torch.where(part.response_mask_T, part.advantages_T * (old_T - reference_T), 0.0)
    lengths_N = torch.tensor(part.lengths, dtype=torch.int64)
    slots_T = (part.prompt_N % NUM_SLOTS).repeat_interleave(lengths_N)
    margins = beta * torch.zeros(NUM_SLOTS, dtype=torch.float64).index_add_(0, slots_T, signed_T)
    return part.with_stream(Stream.MARGINS, sum_over_ranks(margins)[slots_T].float())


def dpo_terms(beta: float, inputs: TokenInputs) -> LossTerms:
    """Loss and metrics of one micro-batch. The loss has DPO's value and gradient, a half of it in either
    response of a pair.

    Metrics of pairs: margin, dpo_accuracy (share with a margin above 0). Of responses, in nats:
    chosen_logratio, rejected_logratio (log p / p_ref of the whole). Of tokens: entropy, fresh_tokens, gap,
    gap_max.
    """
    margins_R, signs_R = inputs.streams[Stream.MARGINS], inputs.advantages_R
    weights_R = signs_R * beta * torch.sigmoid(-margins_R)
    shares_R = 1 / sample_sums(torch.ones_like(margins_R), inputs)[inputs.samples_R]
    half_losses_R = 0.5 * shares_R * softplus(-margins_R)
    loss = half_losses_R.sum() - (weights_R * (inputs.logprobs_R - inputs.logprobs_R.detach())).sum()
    log_ratio_R = (inputs.logprobs_R - inputs.streams[Stream.REFERENCE_LOGPROBS]).detach()
    old_R, rollout_R = inputs.streams[Stream.OLD_LOGPROBS], inputs.streams[Stream.ROLLOUT_LOGPROBS]
    gap_R = torch.where(inputs.fresh_R, (old_R.double() - rollout_R.double()).abs(), 0.0)
    num_tokens, chosen_R = len(inputs.logprobs_R), signs_R > 0
    return LossTerms(
        loss=loss,
        num_tokens=torch.tensor(num_tokens),
        excluded=torch.tensor(0),
        metrics={
            "margin": Mean((shares_R * margins_R).sum(), shares_R.sum()),
            "dpo_accuracy": Mean((shares_R * (margins_R > 0)).sum(), shares_R.sum()),
            "chosen_logratio": Mean(log_ratio_R[chosen_R].sum(), shares_R[chosen_R].sum()),
            "rejected_logratio": Mean(log_ratio_R[~chosen_R].sum(), shares_R[~chosen_R].sum()),
            "entropy": Mean(inputs.entropy_R.sum(), num_tokens),
            "fresh_tokens": Mean(inputs.fresh_R.sum(), num_tokens),
            "gap": Mean(gap_R.sum(), inputs.fresh_R.sum()),
            "gap_max": Max(gap_R.max() if num_tokens else gap_R.sum()),
        },
    )
