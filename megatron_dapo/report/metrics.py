"""Metrics that know their reduction, so that parts measured on different ranks or updates merge into the value of the whole.

merge([{"accuracy": Mean(3, 8)}, {"accuracy": Mean(1, 2)}])["accuracy"].value == 4 / 10
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, kept as the weighted sum and the sum of the weights."""

    total: float
    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"Mean needs a weight of at least 0, got {self.weight}")

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Every value weighs 1."""
        values = list(values)
        return cls(math.fsum(values), len(values))

    @property
    def value(self) -> float:
        """NaN when nothing was measured."""
        return self.total / self.weight if self.weight else math.nan

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True, slots=True)
class EffectiveSize:
    """Kish's effective sample size of weights w, as a fraction: (sum w)^2 / (count * sum w^2). 1 when all are equal."""

    total: float
    squares: float
    count: float

    @property
    def value(self) -> float:
        """NaN when nothing was measured."""
        return self.total**2 / (self.count * self.squares) if self.count else math.nan

    def merge(self, other: EffectiveSize) -> EffectiveSize:
        return EffectiveSize(self.total + other.total, self.squares + other.squares, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value; a NaN stays NaN, it is never hidden by a larger number."""

    value: float

    def merge(self, other: Max) -> Max:
        return self if math.isnan(self.value) or self.value >= other.value else other


@dataclass(frozen=True, slots=True)
class Count:
    """Something that adds up: events, tokens, seconds of work."""

    value: float

    def merge(self, other: Count) -> Count:
        return Count(self.value + other.value)


Metric = Mean | EffectiveSize | Max | Count


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge by name. A name may be missing from some parts; ValueError when two parts reduce it differently."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            if name not in merged:
                merged[name] = metric
                continue
            before = merged[name]
            if type(before) is not type(metric):
                raise ValueError(
                    f"metric {name!r} is a {type(before).__name__} in one part and a {type(metric).__name__} in another; "
                    "report it with one reduction"
                )
            merged[name] = before.merge(metric)  # type: ignore[arg-type]
    return merged


def flatten(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The reduced values, as `Reporter.record` takes them."""
    return {name: float(metric.value) for name, metric in metrics.items()}
