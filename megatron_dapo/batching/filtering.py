"""Which groups are informative: the filter of dynamic sampling (arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from megatron_dapo.types import Group

if TYPE_CHECKING:
    from megatron_dapo.config import SamplingConfig

Verdict = Literal["accepted", "all_correct", "all_wrong", "outside_window", "ungraded"]


def metric_of(group: Group, metric: Literal["accuracy", "reward_std", "reward_mean"]) -> float:
    """What a group is judged by, over its graded completions; NaN if there are none. reward_std is the sample
    standard deviation that advantages are divided by.
    """
    if metric == "accuracy":
        return group.accuracy
    pairs = zip(group.correct, group.rewards, strict=True)
    rewards = [reward for correct, reward in pairs if correct is not None]
    if not rewards:
        return math.nan
    if metric == "reward_mean":
        return fmean(rewards)
    return stdev(rewards) if len(rewards) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Values of the metric that are accepted: `low < value < high`, or with both ends when `inclusive`."""

    low: float = 0.0
    high: float = 1.0
    inclusive: bool = False

    @classmethod
    def of(cls, config: SamplingConfig) -> Window:
        """The configured one."""
        low, high = config.bounds
        return cls(low=low, high=high, inclusive=config.inclusive)

    def judge(self, accuracy: float, value: float | None = None) -> Verdict:
        """accuracy: NaN of a group without any grade. value: of the metric; default the accuracy."""
        if math.isnan(accuracy):
            return "ungraded"
        value = accuracy if value is None else value
        accepted = self.low <= value <= self.high if self.inclusive else self.low < value < self.high
        if accepted:
            return "accepted"
        if accuracy == 1.0:
            return "all_correct"
        return "all_wrong" if accuracy == 0.0 else "outside_window"


def widened(window: Window) -> Window | None:
    """The next wider window half-way to (0, 1) exclusive; None once it is that wide.

    Groups that are all correct or all wrong have no advantage and are never let in by widening.
    """
    if window.low <= 0.0 and window.high >= 1.0:
        return None
    low = window.low / 2 if window.low > 0.05 else 0.0
    high = 1 - (1 - window.high) / 2 if window.high < 0.95 else 1.0
    return Window(low=low, high=high, inclusive=window.inclusive and low > 0.0 and high < 1.0)


def ladder(window: Window) -> list[Window]:
    """The window and all wider ones, up to (0, 1) exclusive."""
    windows, wider = [window], widened(window)
    while wider is not None:
        windows.append(wider)
        wider = widened(wider)
    return windows


def next_level(windows: Sequence[Window], level: int, accuracies: Sequence[float], share: float) -> int:
    """Which of `windows` (narrow to wide) to go on with after a step that used number `level`: the narrower
    one if that accepts at least `share` of the step's groups, the wider one if the present one accepts fewer.
    """

    def suffices(window: Window) -> bool:
        return sum(window.judge(a) == "accepted" for a in accuracies) >= share * len(accuracies)

    if level > 0 and suffices(windows[level - 1]):
        return level - 1
    return level if suffices(windows[level]) else min(level + 1, len(windows) - 1)
