"""Weights, masks and sums of the engine-policy gap against plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import run_ranks

from megatron_dapo.config import DapoConfig
from megatron_dapo.metrics import EffectiveSize, Max, Mean, merge
from megatron_dapo.objectives.base import LOG_LIMIT, LossTerms, TokenInputs
from megatron_dapo.objectives.dapo import dapo
from megatron_dapo.objectives.mismatch import correct, importance_weights, mismatch_sums
from megatron_dapo.types import Stream

OLD = [-1.0, -2.0, -0.5, -3.0, -1.5]
ROLLOUT = [-1.2, -2.4, -0.5, -2.0, -2.5]  # log w: 0.2 0.4 | 0 | -1 1
SAMPLES = [0, 0, 1, 3, 3]  # the third sample has no response token


def t64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(level, old=OLD, rollout=ROLLOUT, samples=SAMPLES, num_samples=4) -> torch.Tensor:
    return importance_weights(
        t64(old), t64(rollout), torch.tensor(samples), level=level, num_samples=num_samples
    )


def test_a_tokens_weight_is_its_own():
    assert weights("token").tolist() == pytest.approx([math.exp(x) for x in (0.2, 0.4, 0, -1, 1)])


def test_a_sequences_weight_is_the_product_of_its_tokens():
    assert weights("sequence").tolist() == pytest.approx([math.exp(0.6), math.exp(0.6), 1.0, 1.0, 1.0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_weight_carries_no_gradient_and_does_not_overflow(level):
    old = t64([-900.0, -0.1]).requires_grad_()
    found = importance_weights(old, t64([-0.1, -900.0]), torch.tensor([0, 1]), level=level, num_samples=2)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([math.exp(-LOG_LIMIT), math.exp(LOG_LIMIT)])


@pytest.mark.parametrize(
    ("correction", "low", "factors", "stay"),
    [
        ("none", None, [1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1]),
        ("truncate", None, [0.3, 0.5, 2.0, 2.0], [1, 1, 1, 1]),
        ("mask", None, [0.3, 0.5, 2.0, 9.0], [1, 1, 1, 0]),
        ("mask", 0.5, [0.3, 0.5, 2.0, 9.0], [0, 1, 1, 0]),
    ],
)
def test_truncating_and_masking(correction, low, factors, stay):
    found, kept = correct(t64([0.3, 0.5, 2.0, 9.0]), correction=correction, low=low, high=2.0)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(factors) and kept.int().tolist() == stay


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_weight_that_is_not_a_number_is_not_trusted(correction):
    """Masked it is left out, truncated it stays NaN: the guards stop at it."""
    factors, stay = correct(t64([math.nan, 1.0]), correction=correction, low=None, high=2.0)
    assert stay.tolist() == [correction == "truncate", True]
    assert math.isnan(factors[0])


# --- the whole loss, token by token -----------------------------------------------------

TOKEN = st.tuples(*[st.floats(-4, 0)] * 3, st.floats(-3, 3), st.integers(0, 3), st.booleans())


def by_hand(tokens, level, correction, low, high) -> tuple[float, float, int]:
    """Loss, sum of the absolute slopes by log-probability, and tokens in the loss: one token at a time, from
    the definitions.
    """
    log_w: dict[Any, float] = {}
    for k, (_, old, rollout, _, sample, _) in enumerate(tokens):
        key = sample if level == "sequence" else k
        log_w[key] = log_w.get(key, 0.0) + old - rollout
    loss = slope = count = 0
    for k, (now, old, _, advantage, sample, _) in enumerate(tokens):
        w = math.exp(log_w[sample if level == "sequence" else k])
        if correction == "mask" and not (low or 0) <= w <= high:
            continue
        w = {"none": 1.0, "truncate": min(w, high), "mask": w}[correction]
        r = math.exp(now - old)
        term = min(r * advantage, min(max(r, 0.8), 1.28) * advantage)
        if advantage < 0:
            term = max(term, 10 * advantage)
        loss -= w * term
        slope += w * abs(advantage) * r if abs(term - r * advantage) < 1e-12 else 0
        count += 1
    return loss, slope, count


def run(tokens, level, correction, low, high) -> tuple[LossTerms, torch.Tensor]:
    """The same as the objective has it, and the gradient by the log-probabilities."""
    columns = list(zip(*tokens, strict=True)) if tokens else [()] * 6
    now, old, rollout, advantages = (t64(column) for column in columns[:4])
    config = DapoConfig(
        mismatch_correction=correction, mismatch_level=level, mismatch_low=low, mismatch_high=high
    )
    inputs = TokenInputs(
        logprobs_R=now.requires_grad_(),
        entropy_R=torch.zeros(len(now)),
        advantages_R=advantages,
        fresh_R=torch.tensor(columns[5], dtype=torch.bool),
        samples_R=torch.tensor(columns[4], dtype=torch.int64),
        num_samples=4,
        streams={Stream.OLD_LOGPROBS: old, Stream.ROLLOUT_LOGPROBS: rollout},
    )
    terms = dapo(config).loss(inputs)
    terms.loss.backward()
    return terms, now.grad


CASES = [
    (level, *rest)
    for level in ("token", "sequence")
    for rest in (("none", None, 2.0), ("truncate", None, 1.5), ("mask", 0.4, 3.0))
]


@pytest.mark.parametrize("case", CASES, ids=str)
@given(tokens=st.lists(TOKEN, min_size=1, max_size=16))
@settings(deadline=None)
def test_the_corrected_loss_equals_the_loop(case, tokens):
    sums, gradient = run(tokens, *case)
    loss, slope, count = by_hand(tokens, *case)
    assert float(sums.loss.detach()) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert float(gradient.abs().sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert int(sums.num_tokens) == count


def make_tokens() -> list[tuple]:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 4, generator=draw) * 0.4
    scale = (0.1, 0.8, 2.0, 0.3)  # of the gap, by sample
    return [
        (a - 2, b - 2, b - 2 + scale[k % 4] * c, d * 3, k % 4, k % 3 > 0)
        for k, (a, b, c, d) in enumerate(rows.tolist())
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[3], [0, 2], [], [1]]])
def test_the_parts_add_up_to_the_whole(case, split):
    """Whole samples over micro-batches and ranks, one of them empty: every sum is that of the one big
    micro-batch.
    """
    tokens = make_tokens()
    whole, _ = run(tokens, *case)
    parts = [run([t for t in tokens if t[4] in samples], *case)[0] for samples in split]
    assert float(sum(part.loss.detach() for part in parts)) == pytest.approx(
        float(whole.loss.detach()), rel=1e-9
    )
    added, largest = (merge(part.metrics for part in parts), whole.metrics)
    for name, metric in largest.items():
        found = [float(getattr(added[name], field.name)) for field in dataclasses.fields(metric)]
        expected = [float(getattr(metric, field.name)) for field in dataclasses.fields(metric)]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), name
    excluded = sum(int(part.excluded) for part in parts)
    assert excluded == int(whole.excluded) == len(tokens) - int(whole.num_tokens)
    assert 0 < int(whole.num_tokens) < len(tokens) or case[1] != "mask"


# --- what is reported -------------------------------------------------------------------


def test_the_metrics_by_hand():
    old, rollout = t64([-1.0, -2.0, -3.0]), t64([-1.5, -1.0, -3.0])  # log w: 0.5 -1 0
    w = importance_weights(old, rollout, torch.tensor([0, 0, 1]), level="token", num_samples=2)
    found = mismatch_sums(
        old, rollout, torch.tensor([True, False, True]), w, torch.tensor([True, False, True])
    )
    assert float(found.gap) == pytest.approx(0.5) and float(found.gap_max) == pytest.approx(
        0.5
    )  # the second is carried
    assert float(found.kl_k1) == pytest.approx(-0.5 + 1.0)
    assert float(found.kl_k3) == pytest.approx((math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1))
    assert float(found.weights) == pytest.approx(math.exp(0.5) + math.exp(-1) + 1)
    assert float(found.squares) == pytest.approx(math.exp(1.0) + math.exp(-2) + 1)
    assert int(found.masked) == 1


def test_a_gap_of_rounding_is_still_seen_in_k3():
    old = torch.tensor([-1.0], dtype=torch.float32)
    rollout = old - 1e-5
    w = importance_weights(old, rollout, torch.tensor([0]), level="token", num_samples=1)
    d = float(old.double() - rollout.double())
    found = mismatch_sums(old, rollout, torch.tensor([True]), w, torch.tensor([True]))
    assert float(found.kl_k3) == pytest.approx(d * d / 2, rel=1e-4)


def test_effective_size_is_that_of_the_whole_and_1_for_equal_weights():
    values = [1.0, 3.0, 0.5, 0.5]
    parts = [
        {"ess": EffectiveSize(sum(v), sum(x * x for x in v), len(v))} for v in (values[:1], values[1:], [])
    ]
    assert merge(parts)["ess"].value == pytest.approx(5.0**2 / (4 * (1 + 9 + 0.25 + 0.25)))
    assert EffectiveSize(6.0, 18.0, 2).value == 1.0
    assert math.isnan(EffectiveSize(0.0, 0.0, 0).value)
    assert (
        merge([{"a": Mean(1, 1)}, {"b": Max(-math.inf)}, {"b": Max(2.0)}])["b"].value == 2.0
    )  # a skipped update's maximum


# --- a sequence over several ranks ------------------------------------------------------


def test_a_sequence_over_two_ranks_has_one_weight():
    first, second = run_ranks(
        "support.jobs_objectives:weights_of_alternate_tokens",
        2,
        old=OLD,
        rollout=ROLLOUT,
        samples=SAMPLES,
        num_samples=4,
    )
    assert first == pytest.approx([math.exp(0.6), 1.0, 1.0]) and second == pytest.approx([math.exp(0.6), 1.0])
