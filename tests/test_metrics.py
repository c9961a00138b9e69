"""Merging the parts gives the metric of the whole, however it is split."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dapo.metrics import Columns, Count, EffectiveSize, Max, Mean, flatten, merge


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


METRICS = {
    "loss": Mean(6.0, 3.0),
    "gap": Max(0.5),
    "ess": EffectiveSize(4.0, 8.0, 2.0),
    "skipped": Count(1.0),
}


def test_metrics_split_into_numbers_to_add_and_numbers_to_take_the_maximum_of():
    columns = Columns.of(METRICS)
    assert columns.split(METRICS) == ([6.0, 3.0, 4.0, 8.0, 2.0, 1.0], [0.5])
    assert (columns.num_sums, columns.num_maxima) == (6, 1)


def test_reduced_numbers_become_the_metrics_that_merging_gives():
    other = {
        "gap": Max(0.25),
        "skipped": Count(0.0),
        "loss": Mean(1.0, 1.0),
        "ess": EffectiveSize(1.0, 1.0, 1.0),
    }
    columns = Columns.of(METRICS)
    (sums, maxima), (more, others) = columns.split(METRICS), columns.split(other)  # in another order
    added = [a + b for a, b in zip(sums, more, strict=True)]
    largest = [max(a, b) for a, b in zip(maxima, others, strict=True)]
    assert columns.join(added, largest) == merge([METRICS, other])


def test_nothing_measured_changes_no_merged_value():
    columns = Columns.of(METRICS)
    assert merge([METRICS, columns.nothing()]) == METRICS
    assert math.isnan(columns.nothing()["loss"].value) and columns.nothing()["gap"].value == -math.inf


@pytest.mark.parametrize("other", [{"loss": Mean(1.0, 1.0)}, METRICS | {"gap": Count(1.0)}])
def test_other_metrics_than_before_are_refused(other):
    with pytest.raises(ValueError, match="gap: Max, loss: Mean, .*a loss reports the same metrics for every"):
        Columns.of(METRICS).split(other)


def test_tensors_are_kept_until_they_are_reduced():
    metrics = {"loss": Mean(torch.tensor(6.0), torch.tensor(3)), "gap": Max(torch.tensor(0.5))}
    sums, maxima = Columns.of(metrics).split(metrics)
    assert [float(x) for x in (*sums, *maxima)] == [6.0, 3.0, 0.5]
