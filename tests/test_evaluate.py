"""Held-out accuracy."""

from __future__ import annotations

import pytest
from support.samples import make_group, make_prompt

from megatron_dapo.evaluate import evaluate


def test_accuracy_is_the_mean_over_problems_of_their_share_of_right_answers():
    """3 of 4, 0 of 4 and 1 of 2 right: (0.75 + 0 + 0.5) / 3."""
    prompts = [make_prompt(i) for i in range(3)]
    groups = [
        make_group(prompts[0], 3),
        make_group(prompts[1], 0),
        make_group(prompts[2], 1, lengths=[4, 10]),
    ]
    result = evaluate(prompts, lambda asked: groups if list(asked) == prompts else [])
    assert result.accuracy == pytest.approx(1.25 / 3)
    assert result.num_problems == 3
    assert result.length_mean == pytest.approx((8 * 1 + 4 + 10) / 10)
