"""Merging the parts gives the metric of the whole, however it is split."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.report.metrics import Count, Max, Mean, flatten, merge


def measure(values: list[float]) -> dict:
    return {"mean": Mean.of(values), "max": Max(max(values)), "count": Count(len(values))}


@pytest.mark.parametrize("split", [[8], [1, 7], [3, 3, 2], [1] * 8])
def test_the_partition_does_not_matter(split):
    values = [1.0, 5.0, -2.0, 8.0, 0.0, 3.0, 3.0, -4.0]
    parts, start = [], 0
    for size in split:
        parts.append(measure(values[start : start + size]))
        start += size
    assert flatten(merge(parts)) == {"mean": 14 / 8, "max": 8.0, "count": 8.0}


def test_a_mean_is_weighted():
    merged = merge([{"loss": Mean(total=6.0, weight=3.0)}, {"loss": Mean(total=10.0, weight=1.0)}])
    assert merged["loss"] == Mean(16.0, 4.0) and merged["loss"].value == 4.0


def test_nothing_measured_is_nan_and_does_not_disturb():
    assert math.isnan(Mean(0.0, 0.0).value)
    assert merge([{"a": Mean(0.0, 0.0)}, {"a": Mean(2.0, 1.0)}])["a"].value == 2.0


def test_a_maximum_keeps_nan():
    for parts in ([math.nan, 1.0], [1.0, math.nan]):
        assert math.isnan(merge([{"a": Max(part)} for part in parts])["a"].value)


def test_a_name_may_be_missing_but_not_change_its_reduction():
    assert flatten(merge([{"a": Count(1)}, {"b": Count(2)}, {"a": Count(4)}])) == {"a": 5.0, "b": 2.0}
    with pytest.raises(ValueError, match="metric 'a' is a Count in one part and a Mean in another"):
        merge([{"a": Count(1)}, {"a": Mean(1, 1)}])


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Mean(1.0, -1)
