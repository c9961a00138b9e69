"""Generalised advantage estimation (arXiv 1506.02438) over responses that end with their reward, without
discount.

Legend: N responses, R their trained tokens end to end. V_t is the value of the text before token t.
"""

from __future__ import annotations

import torch


def length_adaptive_lambda(lengths_N: torch.Tensor, alpha: float) -> torch.Tensor:
    """lambda = 1 - 1 / (alpha * l) of responses of l tokens, at least 0: float64 [N] (VAPO, arXiv 2504.05118,
    section 4.1). What a token is worth so reaches about alpha * l tokens back, however long the response.
    """
    return (1 - 1 / (alpha * lengths_N.double().clamp(min=1))).clamp(min=0)


def advantages(
    rewards_R: torch.Tensor, values_R: torch.Tensor, lengths_N: torch.Tensor, lambdas_N: torch.Tensor
) -> torch.Tensor:
    """A_t = delta_t + lambda A_{t+1} with delta_t = r_t + V_{t+1} - V_t in each response, nothing behind its
    last token: float64 [R].
    """
    values_R = values_R.double()
    next_R = torch.cat([values_R[1:], values_R.new_zeros(1)])[: len(values_R)]
    next_R[last_tokens(lengths_N)] = 0
    return _decayed_sums(rewards_R.double() + next_R - values_R, lengths_N, lambdas_N.double())


def last_tokens(lengths_N: torch.Tensor) -> torch.Tensor:
    """Where the last token of each response stands in R; none of those without a token."""
    return (lengths_N.cumsum(0) - 1)[lengths_N > 0]


def _decayed_sums(deltas_R: torch.Tensor, lengths_N: torch.Tensor, lambdas_N: torch.Tensor) -> torch.Tensor:
    """S_t = delta_t + lambda S_{t+1}, from the last tokens of all responses backwards at once."""
    order_N = lengths_N.argsort(descending=True)
    last_N, lambdas_N = (lengths_N.cumsum(0) - 1)[order_N], lambdas_N[order_N]
    sum_N, sums_R = torch.zeros_like(lambdas_N), torch.zeros_like(deltas_R)
    longest = int(lengths_N.max()) if len(lengths_N) else 0
    # how many responses have more than 0, 1, 2 ... tokens: those are the first of them in this order
    num_longer = len(lengths_N) - torch.bincount(lengths_N, minlength=1).cumsum(0)
    for back, num in enumerate(num_longer.tolist()[:longest]):
        where = last_N[:num] - back
        sum_N[:num] = deltas_R[where] + lambdas_N[:num] * sum_N[:num]
        sums_R[where] = sum_N[:num]
    return sums_R
