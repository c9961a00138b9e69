"""Which groups are informative: the filter of dynamic sampling (arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["accepted", "all_correct", "all_wrong", "outside_window", "ungraded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Accuracies that are accepted: `low < accuracy < high`, or with both ends when `inclusive`."""

    low: float = 0.0
    high: float = 1.0
    inclusive: bool = False

    def judge(self, accuracy: float) -> Verdict:
        """accuracy: NaN of a group without any grade."""
        if math.isnan(accuracy):
            return "ungraded"
        accepted = self.low <= accuracy <= self.high if self.inclusive else self.low < accuracy < self.high
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
