"""GAE over responses laid end to end, against loops over tokens and against values by hand."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.objectives.gae import advantages, last_tokens, length_adaptive_lambda


def naive(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """The definition: the sum over later tokens of lambda^l times their temporal difference."""
    after = [*values, 0.0][1:]
    deltas = [r + v_next - v for r, v_next, v in zip(rewards, after, values, strict=True)]
    return [sum(lam**k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_by_hand():
    """Rewards 0, 1 and values 0.5, 0.25: deltas -0.25 and 0.75."""
    found = advantages(
        torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([2]), torch.tensor([0.5])
    )
    assert found.tolist() == [-0.25 + 0.5 * 0.75, 0.75]


def test_at_lambda_one_it_is_what_is_still_to_come_less_the_value():
    found = advantages(
        torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.3, 0.6, 0.9]), torch.tensor([3]), torch.ones(1)
    )
    torch.testing.assert_close(found, torch.tensor([0.7, 0.4, 0.1], dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1)), min_size=1, max_size=6), st.integers(0, 999))
def test_responses_do_not_reach_into_each_other(responses, seed):
    draw = random.Random(seed)
    lengths, lambdas = zip(*responses, strict=True)
    rewards = [[draw.gauss(0, 1) for _ in range(length)] for length in lengths]
    values = [[draw.gauss(0, 1) for _ in range(length)] for length in lengths]
    found = advantages(
        torch.tensor(sum(rewards, []), dtype=torch.float64),
        torch.tensor(sum(values, []), dtype=torch.float64),
        torch.tensor(lengths),
        torch.tensor(lambdas, dtype=torch.float64),
    )
    expected = [a for r, v, lam in zip(rewards, values, lambdas, strict=True) for a in naive(r, v, lam)]
    assert found.tolist() == pytest.approx(expected)


def test_the_last_tokens_of_responses_without_any_are_nobodys():
    assert last_tokens(torch.tensor([2, 0, 3, 0])).tolist() == [1, 4]
    assert last_tokens(torch.tensor([0, 2])).tolist() == [1]


def test_lambda_by_length():
    """alpha 0.05: 1 - 1 / (0.05 x 100) = 0.8; below 20 tokens the formula is negative."""
    found = length_adaptive_lambda(torch.tensor([100, 1000, 20, 5, 0]), 0.05)
    assert found.tolist() == pytest.approx([0.8, 0.98, 0.0, 0.0, 0.0])


def test_no_responses():
    none = torch.zeros(0)
    assert advantages(none, none, torch.zeros(0, dtype=torch.int64), none).shape == (0,)
    one_without_tokens = advantages(none, none, torch.zeros(1, dtype=torch.int64), torch.ones(1))
    assert one_without_tokens.shape == (0,)


def test_twenty_thousand_tokens_take_no_time():
    """A loop over tokens would take a minute."""
    lengths = torch.full((256,), 20_480)
    tokens = torch.randn(256 * 20_480)
    found = advantages(tokens, tokens, lengths, torch.full((256,), 0.9))
    assert found.shape == tokens.shape
