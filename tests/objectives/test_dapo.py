"""The loss against a float64 loop written from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.config import DapoConfig
from megatron_dapo.metrics import EffectiveSize, flatten
from megatron_dapo.objectives.base import LossTerms, TokenInputs
from megatron_dapo.objectives.dapo import dapo
from megatron_dapo.types import Stream

PAPER = dict(eps_low=0.2, eps_high=0.28, dual_clip=10.0)


def loss(now, old, advantages, mask, **options) -> LossTerms:
    """Of the tokens in the mask, which a mask of the whole step says (with weights of 1)."""
    now, old, advantages = (torch.as_tensor(x, dtype=torch.float64) for x in (now, old, advantages))
    kept = torch.as_tensor(mask)
    inputs = TokenInputs(
        logprobs_R=now,
        entropy_R=torch.zeros(len(now)),
        advantages_R=advantages,
        fresh_R=kept,
        samples_R=torch.zeros(len(now), dtype=torch.int64),
        num_samples=1,
        streams={Stream.OLD_LOGPROBS: old, Stream.ROLLOUT_LOGPROBS: old, Stream.KEPT: kept.double()},
    )
    return dapo(DapoConfig(mismatch_correction="second_moment", **(PAPER | options))).loss(inputs)


def total(terms: LossTerms, name: str) -> float:
    """The sum over tokens whose mean is reported."""
    return float(terms.metrics[name].total)


def by_hand(now, old, advantage, *, eps_low, eps_high, dual_clip) -> tuple[float, float]:
    """One token's loss and its derivative by the log-probability."""
    ratio = math.exp(now - old)
    if advantage >= 0:
        return (
            (-advantage * (1 + eps_high), 0.0)
            if ratio > 1 + eps_high
            else (-advantage * ratio, -advantage * ratio)
        )
    if ratio < 1 - eps_low:
        return -advantage * (1 - eps_low), 0.0
    if dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip, 0.0
    return -advantage * ratio, -advantage * ratio


TOKENS = st.lists(
    st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.floats(-3, 3), st.booleans()), min_size=1, max_size=20
)


@given(TOKENS, st.floats(0.05, 0.5), st.floats(0.05, 0.9), st.one_of(st.none(), st.floats(1.5, 20)))
@settings(deadline=None)  # the clock of a busy machine
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
    assert (total(sums, "clip_low"), total(sums, "clip_high")) == (1, 1)


def test_a_clip_never_holds_back_the_way_home():
    # a ratio too high with a negative advantage, or too low with a positive one, keeps its gradient
    now = torch.log(torch.tensor([1.5, 0.5], dtype=torch.float64)).requires_grad_()
    sums = loss(now, [0.0] * 2, [-1.0, 1.0], [True] * 2)
    sums.loss.backward()
    assert now.grad.tolist() == pytest.approx([1.5, -0.5])
    assert (total(sums, "clip_low"), total(sums, "clip_high")) == (0, 0)


def test_dual_clip_bounds_negative_advantages_alone():
    for dual_clip, expected in ((10.0, 2 * 10.0), (3.0, 2 * 3.0), (None, 2 * 20.0)):
        assert float(loss([math.log(20)], [0.0], [-2.0], [True], dual_clip=dual_clip).loss) == pytest.approx(
            expected
        )
        assert float(loss([math.log(20)], [0.0], [2.0], [True], dual_clip=dual_clip).loss) == pytest.approx(
            -2 * 1.28
        )


def test_tokens_that_the_dual_clip_holds_back_are_counted():
    ratios, advantages = [20.0, 9.0, 20.0, 20.0], [-1.0, -1.0, 1.0, -1.0]
    mask = [True, True, True, False]
    for dual_clip, expected in ((10.0, 1), (8.0, 2), (None, 0)):
        sums = loss([math.log(r) for r in ratios], [0.0] * 4, advantages, mask, dual_clip=dual_clip)
        assert total(sums, "clip_dual") == expected


def test_kl_is_the_k3_estimate():
    sums = loss([-1.0, -2.0, 5.0], [-1.5, -1.0, 0.0], [1.0] * 3, [True, True, False])
    assert total(sums, "kl_old") == pytest.approx((math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_nothing_outside_the_mask_arrives(stream, bad):
    streams = [
        torch.tensor([-1.0, -2.0, -3.0]),
        torch.tensor([-1.1, -1.9, -3.2]),
        torch.tensor([1.0, 2.0, -1.0]),
    ]
    mask = torch.tensor([True, False, True])
    results = []
    for value in (0.0, bad):
        changed = [s.clone() for s in streams]
        changed[stream][1] = value
        leaf = changed[0].requires_grad_()
        sums = loss(leaf, *changed[1:], mask)
        sums.loss.backward()
        sides = [total(sums, name) for name in ("clip_low", "clip_high", "clip_dual", "kl_old")]
        results.append(([float(sums.loss.detach()), int(sums.num_tokens), *sides], leaf.grad.tolist()))
    assert results[0] == results[1] and results[1][1][1] == 0.0


def test_no_token_is_a_loss_of_zero():
    leaf = torch.tensor([-1.0], requires_grad=True)
    sums = loss(leaf, [-1.0], [1.0], [False])
    sums.loss.backward()
    assert (float(sums.loss.detach()), int(sums.num_tokens), leaf.grad.tolist()) == (0.0, 0, [0.0])


# --- the objective: loss and metrics of a micro-batch -----------------------------------


def terms_of(config: DapoConfig) -> LossTerms:
    """Four tokens, two samples. log w = old - rollout: 0.5, -1, 0, 0; log r = now - old: 0, 0, 0.5, -0.5."""
    inputs = TokenInputs(
        logprobs_R=torch.tensor([-1.0, -2.0, -1.5, -3.5]).requires_grad_(),
        entropy_R=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        advantages_R=torch.tensor([1.0, 1.0, 1.0, -1.0]),
        fresh_R=torch.tensor([True, True, False, False]),
        samples_R=torch.tensor([0, 0, 1, 1]),
        num_samples=2,
        streams={
            Stream.OLD_LOGPROBS: torch.tensor([-1.0, -2.0, -2.0, -3.0]),
            Stream.ROLLOUT_LOGPROBS: torch.tensor([-1.5, -1.0, -2.0, -3.0]),
        },
    )
    return dapo(config).loss(inputs)


def k3(log_ratio: float) -> float:
    return math.exp(log_ratio) - 1 - log_ratio


def test_terms_of_a_micro_batch_by_hand():
    terms = terms_of(DapoConfig(mismatch_correction="none"))
    # ratios 1, 1, e^0.5 (clipped to 1.28), e^-0.5 (clipped to 0.8 where the advantage is negative)
    assert float(terms.loss.detach()) == pytest.approx(-(1 + 1 + 1.28) + 0.8)
    assert (int(terms.num_tokens), int(terms.excluded)) == (4, 0)
    assert flatten(terms.metrics) == pytest.approx(
        {
            "clip_low": 1 / 4,
            "clip_high": 1 / 4,
            "clip_dual": 0.0,
            "kl_old": (k3(0.5) + k3(-0.5)) / 4,
            "entropy": 10 / 4,
            "fresh_tokens": 2 / 4,
            "kl_k1": (-0.5 + 1) / 4,
            "kl_k3": (k3(0.5) + k3(-1)) / 4,
            "masked": 0.0,
            "gap": (0.5 + 1) / 2,  # of the two fresh tokens
            "gap_max": 1.0,
            "ess": (math.exp(0.5) + math.exp(-1) + 2) ** 2 / (4 * (math.exp(1) + math.exp(-2) + 2)),
        },
        rel=1e-6,
    )


def test_what_the_mismatch_correction_masks_is_excluded_from_the_denominator():
    terms = terms_of(DapoConfig(mismatch_correction="mask", mismatch_low=0.5, mismatch_high=2.0))
    # the second token, with w = 1 / e, leaves the loss; the first one counts e^0.5
    assert (int(terms.num_tokens), int(terms.excluded)) == (3, 1)
    assert float(terms.loss.detach()) == pytest.approx(-(math.exp(0.5) + 1.28) + 0.8)
    found = flatten(terms.metrics)
    assert found["clip_high"] == pytest.approx(1 / 3)  # of the tokens in the loss
    assert found["masked"] == 1 / 4 and found["entropy"] == 10 / 4  # of all


def test_a_micro_batch_without_tokens_reports_the_same_metrics():
    none = torch.zeros(0)
    inputs = TokenInputs(
        logprobs_R=none.clone().requires_grad_(),
        entropy_R=none,
        advantages_R=none,
        fresh_R=none.bool(),
        samples_R=none.long(),
        num_samples=0,
        streams={Stream.OLD_LOGPROBS: none, Stream.ROLLOUT_LOGPROBS: none},
    )
    terms = dapo(DapoConfig(mismatch_correction="none")).loss(inputs)
    assert {name: type(m) for name, m in terms.metrics.items()} == {
        name: type(m) for name, m in terms_of(DapoConfig(mismatch_correction="none")).metrics.items()
    }
    assert float(terms.loss.detach()) == 0 and terms.metrics["ess"] == EffectiveSize(0, 0, 0)
