"""The loss against a float64 loop written from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.algo.loss import LossSums, dapo_loss

PAPER = dict(eps_low=0.2, eps_high=0.28, dual_clip=10.0)


def loss(now, old, advantages, mask, **options) -> LossSums:
    streams = [torch.as_tensor(x, dtype=torch.float64) for x in (now, old, advantages)]
    return dapo_loss(*streams, torch.as_tensor(mask), **(PAPER | options))


def by_hand(now, old, advantage, *, eps_low, eps_high, dual_clip) -> tuple[float, float]:
    """One token's loss and its derivative by the log-probability."""
    ratio = math.exp(now - old)
    if advantage >= 0:
        return (-advantage * (1 + eps_high), 0.0) if ratio > 1 + eps_high else (-advantage * ratio, -advantage * ratio)
    if ratio < 1 - eps_low:
        return -advantage * (1 - eps_low), 0.0
    if dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip, 0.0
    return -advantage * ratio, -advantage * ratio


TOKENS = st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.floats(-3, 3), st.booleans()), min_size=1, max_size=20)


@given(TOKENS, st.floats(0.05, 0.5), st.floats(0.05, 0.9), st.one_of(st.none(), st.floats(1.5, 20)))
def test_sums_and_gradient_equal_the_loop(tokens, eps_low, eps_high, dual_clip):
    options = dict(eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip)
    now, old, advantages, mask = (list(column) for column in zip(*tokens, strict=True))
    leaf = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    sums = loss(leaf, old, advantages, mask, **options)
    sums.loss.backward()
    expected = [by_hand(n, o, a, **options) if m else (0.0, 0.0) for n, o, a, m in tokens]
    assert float(sums.loss.detach()) == pytest.approx(sum(value for value, _ in expected), rel=1e-9, abs=1e-9)
    edges = [1 - eps_low, 1 + eps_high, dual_clip or 1.0]
    for gradient, (_, slope), n, o in zip(leaf.grad.tolist(), expected, now, old, strict=True):
        if min(abs(math.exp(n - o) - edge) for edge in edges) > 1e-9:  # no derivative where a clip begins
            assert gradient == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert int(sums.num_tokens) == sum(mask)


def test_clip_higher_lets_ratios_rise_further_than_fall():
    now = torch.log(torch.tensor([1.25, 1.30, 0.85, 0.75], dtype=torch.float64)).requires_grad_()
    sums = loss(now, [0.0] * 4, [1.0, 1.0, -1.0, -1.0], [True] * 4)
    sums.loss.backward()
    assert float(sums.loss.detach()) == pytest.approx(-1.25 - 1.28 + 0.85 + 0.8)
    assert now.grad.tolist() == pytest.approx([-1.25, 0.0, 0.85, 0.0])
    assert (int(sums.clip_low), int(sums.clip_high)) == (1, 1)


def test_a_clip_never_holds_back_the_way_home():
    # a ratio too high with a negative advantage, or too low with a positive one, keeps its gradient
    now = torch.log(torch.tensor([1.5, 0.5], dtype=torch.float64)).requires_grad_()
    sums = loss(now, [0.0] * 2, [-1.0, 1.0], [True] * 2)
    sums.loss.backward()
    assert now.grad.tolist() == pytest.approx([1.5, -0.5])
    assert (int(sums.clip_low), int(sums.clip_high)) == (0, 0)


def test_dual_clip_bounds_negative_advantages_alone():
    for dual_clip, expected in ((10.0, 2 * 10.0), (3.0, 2 * 3.0), (None, 2 * 20.0)):
        assert float(loss([math.log(20)], [0.0], [-2.0], [True], dual_clip=dual_clip).loss) == pytest.approx(expected)
        assert float(loss([math.log(20)], [0.0], [2.0], [True], dual_clip=dual_clip).loss) == pytest.approx(-2 * 1.28)


def test_kl_is_the_k3_estimate():
    sums = loss([-1.0, -2.0, 5.0], [-1.5, -1.0, 0.0], [1.0] * 3, [True, True, False])
    assert float(sums.kl_old) == pytest.approx((math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_nothing_outside_the_mask_arrives(stream, bad):
    streams = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.1, -1.9, -3.2]), torch.tensor([1.0, 2.0, -1.0])]
    mask = torch.tensor([True, False, True])
    results = []
    for value in (0.0, bad):
        changed = [s.clone() for s in streams]
        changed[stream][1] = value
        leaf = changed[0].requires_grad_()
        sums = dapo_loss(leaf, *changed[1:], mask, **PAPER)
        sums.loss.backward()
        sides = [float(x) for x in (sums.loss.detach(), sums.num_tokens, sums.clip_low, sums.clip_high, sums.kl_old)]
        results.append((sides, leaf.grad.tolist()))
    assert results[0] == results[1] and results[1][1][1] == 0.0


def test_no_token_is_a_loss_of_zero():
    leaf = torch.tensor([-1.0], requires_grad=True)
    sums = dapo_loss(leaf, torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([False]), **PAPER)
    sums.loss.backward()
    assert (float(sums.loss.detach()), int(sums.num_tokens), leaf.grad.tolist()) == (0.0, 0, [0.0])
