"""Engines that compute something else than the policy are spoken of."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.report.step import gap_warning

GAP = "policy/rollout_logprob_gap"


def test_a_wide_gap_is_told_with_the_key_that_compares_the_weights():
    text = gap_warning({GAP: 0.7697}, 0.1)
    assert "0.77 nats" in text and "report.gap_warning=0.1" in text and "run.verify_sync=true" in text


@pytest.mark.parametrize(
    ("gap", "limit"), [(5e-7, 0.1), (0.1, 0.1), (0.7, None), (math.nan, 0.1)]
)  # NaN: no token was fresh
def test_a_narrow_one_is_not(gap, limit):
    assert gap_warning({GAP: gap}, limit) == ""
