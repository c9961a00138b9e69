"""The learning rate of every update, by hand."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.config import OptimizerConfig
from megatron_dapo.policy.optimizer import build_schedule


class FakeOptimizer:
    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0}]


def rates(num: int, **options) -> list[float]:
    """Learning rates of updates 1 to `num`; Policy.update steps the schedule before the optimizer."""
    optimizer = FakeOptimizer()
    schedule = build_schedule(OptimizerConfig(**options), optimizer)
    found = []
    for _ in range(num):
        schedule.step(increment=1)
        found.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
    return found


def test_constant():
    assert rates(3, lr=2e-4) == pytest.approx([2e-4] * 3)


def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_update():
    assert rates(6, lr=1.0, warmup_updates=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_falls_to_the_least_rate_and_stays():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    assert rates(6, lr=1.0, min_lr=0.1, decay="cosine", decay_updates=4) == pytest.approx(
        [*expected, 0.1, 0.1]
    )


def test_cosine_after_a_warm_up():
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)), 0.0]
    assert rates(7, lr=1.0, warmup_updates=2, decay="cosine", decay_updates=6) == pytest.approx(
        expected, abs=1e-12
    )
