"""Metrics that know their reduction, so that parts measured on different ranks or updates merge into the
value of the whole.

merge([{"accuracy": Mean(3, 8)}, {"accuracy": Mean(1, 2)}])["accuracy"].value == 4 / 10

A metric is made of numbers that are all added (Mean, EffectiveSize, Count) or of one of which the largest
counts (Max). `Columns` turns a dictionary of metrics into two plain vectors and back, so that whoever reduces
them over micro-batches and ranks needs to know neither names nor kinds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Number = float | torch.Tensor  # a tensor has no dimensions; it becomes a number when it has been reduced


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, kept as the weighted sum and the sum of the weights."""

    total: Number
    weight: Number

    def __post_init__(self) -> None:
        # A tensor is not looked at: on a GPU that would wait for it.
        if isinstance(self.weight, (int, float)) and self.weight < 0:
            raise ValueError(f"Mean needs a weight of at least 0, got {self.weight}")

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Every value weighs 1."""
        values = list(values)
        return cls(math.fsum(values), len(values))

    @property
    def value(self) -> Number:
        """NaN when nothing was measured."""
        return self.total / self.weight if self.weight else math.nan

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True, slots=True)
class EffectiveSize:
    """Kish's effective sample size of weights w, as a fraction: (sum w)^2 / (count * sum w^2). 1 when all are
    equal.
    """

    total: Number
    squares: Number
    count: Number

    @property
    def value(self) -> Number:
        """NaN when nothing was measured."""
        return self.total**2 / (self.count * self.squares) if self.count else math.nan

    def merge(self, other: EffectiveSize) -> EffectiveSize:
        return EffectiveSize(self.total + other.total, self.squares + other.squares, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value; a NaN stays NaN, it is never hidden by a larger number."""

    value: Number

    def merge(self, other: Max) -> Max:
        return self if math.isnan(self.value) or self.value >= other.value else other


@dataclass(frozen=True, slots=True)
class Count:
    """Something that adds up: events, tokens, seconds of work."""

    value: Number

    def merge(self, other: Count) -> Count:
        return Count(self.value + other.value)


Metric = Mean | EffectiveSize | Max | Count


@dataclass(frozen=True, slots=True)
class Columns:
    """Names and kinds of metrics, in a fixed order: which number of a vector is what.

    Columns.of({"loss": Mean(6.0, 3.0), "gap": Max(0.5)}).split(...) == ([6.0, 3.0], [0.5])
    """

    kinds: Mapping[str, type[Metric]]

    @classmethod
    def of(cls, metrics: Mapping[str, Metric]) -> Columns:
        return cls({name: type(metric) for name, metric in metrics.items()})

    @property
    def num_sums(self) -> int:
        return sum(len(dataclasses.fields(kind)) for kind in self.kinds.values() if kind is not Max)

    @property
    def num_maxima(self) -> int:
        return sum(kind is Max for kind in self.kinds.values())

    def split(self, metrics: Mapping[str, Metric]) -> tuple[list[Number], list[Number]]:
        """The numbers to add and those to take the maximum of. ValueError when these are other metrics."""
        if {name: type(metric) for name, metric in metrics.items()} != self.kinds:
            raise ValueError(
                f"metrics {_described(metrics)} are not {_described(self.kinds)}; a loss reports the same "
                "metrics for every micro-batch, an empty one included"
            )
        sums: list[Number] = []
        maxima: list[Number] = []
        for name, kind in self.kinds.items():
            numbers = maxima if kind is Max else sums
            numbers += [getattr(metrics[name], field.name) for field in dataclasses.fields(kind)]
        return sums, maxima

    def join(self, sums: Sequence[float], maxima: Sequence[float]) -> dict[str, Metric]:
        """The metrics that `split` would take apart into these numbers."""
        added, largest = iter(sums), iter(maxima)
        return {
            name: kind(*(next(largest if kind is Max else added) for _ in dataclasses.fields(kind)))
            for name, kind in self.kinds.items()
        }

    def nothing(self) -> dict[str, Metric]:
        """What these metrics are where nothing was measured; merging it with others changes nothing."""
        return self.join([0.0] * self.num_sums, [-math.inf] * self.num_maxima)


def _described(metrics: Mapping[str, Metric | type[Metric]]) -> str:
    kinds = {name: m if isinstance(m, type) else type(m) for name, m in metrics.items()}
    return ", ".join(f"{name}: {kind.__name__}" for name, kind in sorted(kinds.items())) or "(none)"


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge by name. A name may be missing from some parts; ValueError if two parts reduce it differently."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            if name not in merged:
                merged[name] = metric
                continue
            before = merged[name]
            if type(before) is not type(metric):
                raise ValueError(
                    f"metric {name!r} is a {type(before).__name__} in one part and a {type(metric).__name__} "
                    f"in another; report it with one reduction"
                )
            merged[name] = before.merge(metric)  # type: ignore[arg-type]
    return merged


def flatten(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The reduced values, as `Reporter.record` takes them."""
    return {name: float(metric.value) for name, metric in metrics.items()}
