"""Every objective written from its paper, in float64, one response at a time; and responses to try them on.

What a response contributes is the sum of its tokens' terms. Objectives with one ratio for a response (GSPO,
GMPO) contribute that of each of its tokens: their number times the response's objective.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dapo.config.objective import KINDS
from megatron_dapo.objectives.base import TokenInputs
from megatron_dapo.types import Stream

GROUP_KINDS = [kind for kind in KINDS if kind not in ("ppo", "dpo")]
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_mean_token_sum", "constant"]


@dataclass(frozen=True, kw_only=True)
class Response:
    """Its tokens' log-probabilities, entropies and streams; log-probabilities of four models."""

    now: list[float]
    old: list[float]
    rollout: list[float]
    reference: list[float]
    entropy: list[float]
    advantage: float
    correct: bool
    held_back: list[bool]


def make_responses(
    seed: int = 0, lengths: Sequence[int] = (4, 1, 7, 2, 5), wide: float = 0.3
) -> list[Response]:
    """Ratios near 1 and far from it, advantages of both signs; the third sample of six has no token."""
    draw = random.Random(seed)
    responses = []
    for i, length in enumerate(lengths):
        old = [-0.05 - 2 * draw.random() for _ in range(length)]
        responses.append(
            Response(
                now=[min(x + draw.gauss(0, wide), -0.01) for x in old],
                old=old,
                rollout=[min(x + draw.gauss(0, 0.2), -0.01) for x in old],
                reference=[x + draw.gauss(0, 0.3) for x in old],
                entropy=[draw.random() for _ in old],
                advantage=(1.5, -1.0, 0.7, -0.4, 0.2)[i % 5],
                correct=i % 2 == 0,
                held_back=[draw.random() < 0.3 for _ in old],
            )
        )
    return responses


# --- the same as an objective sees it ----------------------------------------------------


def make_inputs(
    responses: Sequence[Response],
    here: Callable[[int, int], bool] = lambda i, t: True,
    group: Any = None,
    lm_weight: float = 1.0,
) -> tuple[TokenInputs, list[tuple[int, int]]]:
    """The tokens t of responses i for which `here(i, t)`, and which they are. There is one more sample,
    without a token, in the middle.
    """
    where = [(i, t) for i, response in enumerate(responses) for t in range(len(response.now)) if here(i, t)]

    def stream(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(responses[i], name)[t]) for i, t in where], dtype=torch.float64)

    inputs = TokenInputs(
        logprobs_R=stream("now").requires_grad_(),
        entropy_R=stream("entropy").requires_grad_(),
        advantages_R=torch.tensor([responses[i].advantage for i, _ in where], dtype=torch.float64),
        fresh_R=torch.tensor([i % 2 == 0 for i, _ in where], dtype=torch.bool),
        samples_R=torch.tensor([i + (i >= 2) for i, _ in where], dtype=torch.int64),
        num_samples=len(responses) + 1,
        streams={
            Stream.ROLLOUT_LOGPROBS: stream("rollout"),
            Stream.OLD_LOGPROBS: stream("old"),
            Stream.REFERENCE_LOGPROBS: stream("reference"),
            Stream.HIGH_COVARIANCE: stream("held_back"),
            Stream.LM_WEIGHTS: torch.tensor(
                [lm_weight * responses[i].correct for i, _ in where], dtype=torch.float64
            ),
        },
        sample_group=group,
    )
    return inputs, where


# --- the papers' formulas ----------------------------------------------------------------


def clipped(ratio: torch.Tensor, advantage: float, config: Any) -> torch.Tensor:
    """By cases of the sign instead of by minima."""
    if advantage >= 0:
        return advantage * ratio.clamp(max=1 + config.eps_high)
    bound = math.inf if config.dual_clip is None else config.dual_clip
    return advantage * ratio.clamp(min=1 - config.eps_low, max=bound)


def ppo_like(now, old, rollout, advantage, config) -> torch.Tensor:
    return clipped((now - old).exp(), advantage, config).sum()


def gspo(now, old, rollout, advantage, config) -> torch.Tensor:
    return len(now) * clipped((now.sum() / len(now) - old.sum() / len(old)).exp(), advantage, config)


def cispo(now, old, rollout, advantage, config) -> torch.Tensor:
    total = now.new_zeros(())
    for p, q in zip(now, old, strict=True):
        weight = min(max(math.exp(p.item() - q.item()), 1 - config.eps_low), 1 + config.eps_high)
        total = total + weight * advantage * p
    return total


def sapo(now, old, rollout, advantage, config) -> torch.Tensor:
    tau = config.tau_pos if advantage > 0 else config.tau_neg
    return (4 / tau / (1 + (-tau * ((now - old).exp() - 1)).exp()) * advantage).sum()


def gmpo(now, old, rollout, advantage, config) -> torch.Tensor:
    ratio = (now - old).exp()
    cut = ratio.clamp(math.exp(-config.log_eps_low), math.exp(config.log_eps_high))
    product = torch.minimum(ratio * advantage, cut * advantage).abs().prod()
    return len(now) * math.copysign(1.0, advantage) * product ** (1 / len(now))


def dppo(now, old, rollout, advantage, config) -> torch.Tensor:
    total = now.new_zeros(())
    for logp, logold, logq in zip(now, old, rollout, strict=True):
        p, q = math.exp(logp.item()), math.exp(logq.item())
        kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        divergence = abs(p - q) if config.divergence == "tv" else kl
        further = p > q if advantage > 0 else p < q
        if not (further and divergence > config.delta):
            weight = min(math.exp(logp.item() - logold.item()), config.ratio_max)
            total = total + weight * advantage * (1 + logp - logp.detach())
    return total


FORMULAS = {"gspo": gspo, "cispo": cispo, "sapo": sapo, "gmpo": gmpo, "dppo": dppo}


def kl(now: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    if estimator == "k2":
        return ((now - reference) ** 2 / 2).sum()
    return ((reference - now).exp() - 1 - (reference - now)).sum()


def expected(config: Any, responses: Sequence[Response]) -> tuple[float, dict[tuple[int, int], float], list]:
    """Loss, its derivative by each token's log-probability, and by each entropy."""
    leaves = [torch.tensor(r.now, dtype=torch.float64, requires_grad=True) for r in responses]
    entropies = [torch.tensor(r.entropy, dtype=torch.float64, requires_grad=True) for r in responses]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for response, now, entropy in zip(responses, leaves, entropies, strict=True):
        old, rollout, reference = (
            torch.tensor(x, dtype=torch.float64) for x in (response.old, response.rollout, response.reference)
        )
        own = FORMULAS.get(config.kind, ppo_like)(now, old, rollout, response.advantage, config)
        if config.kl_coef and config.kl_in == "loss":
            own = own - config.kl_coef * kl(now, reference, config.kl_estimator)
        own = own + config.entropy_coef * entropy.sum()
        if response.correct:
            own = own + config.lambda_lm * now.sum()
        if config.covariance == "kl":
            held = torch.tensor(response.held_back)
            own = own - config.covariance_kl_coef * (now - old)[held].abs().sum()
        length = len(now)
        weight = 1 / length if config.aggregation == "sequence_mean" else 1.0
        total = total + weight * own
        count += {"token_mean": length, "constant": config.constant_length}.get(config.aggregation, 1)
    loss = -total / count
    gradients = torch.autograd.grad(loss, leaves + entropies, allow_unused=True, materialize_grads=True)
    by_token = {
        (i, t): float(value)
        for i, gradient in enumerate(gradients[: len(leaves)])
        for t, value in enumerate(gradient)
    }
    return float(loss.detach()), by_token, [float(x) for g in gradients[len(leaves) :] for x in g]
