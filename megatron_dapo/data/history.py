"""What the groups of each prompt have said so far: how often it was seen, and the newest pass rate.

Requests finish in any order and run ahead, so a choice by what happens to be known would depend on timing.
Verdicts therefore come in stream order, as steps consume them, and are shown only to prompts that are so far
behind that they are known by then in any case (`reveal`). The order of prompts is so a function of the seed
and of the verdicts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Known:
    """Of one row. pass_rate: accuracy of its newest group. rest: turns for which it is still skipped."""

    seen: int
    pass_rate: float
    rest: int


class History:
    """Verdicts by row. skip_solved: turns for which a row is skipped when its newest group had an accuracy of
    at least `solved`.
    """

    def __init__(self, skip_solved: int = 0, solved: float = 1.0) -> None:
        self._skip_solved, self._solved = skip_solved, solved
        self._rows: dict[int, Known] = {}
        self._waiting: deque[tuple[int, int, float]] = deque()  # (position, row, accuracy), not revealed yet
        self.num_solved = 0  # rows, by their newest group

    @property
    def num_seen(self) -> int:
        """Rows with a revealed verdict."""
        return len(self._rows)

    def record(self, position: int, row: int, accuracy: float) -> None:
        """A verdict, in stream order; NaN (nothing was graded) says nothing."""
        if not math.isnan(accuracy):
            self._waiting.append((position, row, accuracy))

    def reveal(self, end: int) -> None:
        """From now on the verdicts of all positions before `end` count."""
        while self._waiting and self._waiting[0][0] < end:
            _, row, accuracy = self._waiting.popleft()
            known, solved = self._rows.get(row), accuracy >= self._solved
            self.num_solved += solved - (known is not None and known.pass_rate >= self._solved)
            rest = self._skip_solved if solved else 0
            self._rows[row] = Known(known.seen + 1 if known else 1, accuracy, rest)

    def of(self, row: int) -> Known | None:
        """What is known of a row; None before its first verdict."""
        return self._rows.get(row)

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [[row, known.seen, known.pass_rate, known.rest] for row, known in self._rows.items()]
        return {"rows": rows, "waiting": [list(verdict) for verdict in self._waiting]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._rows = {row: Known(seen, rate, rest) for row, seen, rate, rest in state["rows"]}
        self._waiting = deque((position, row, accuracy) for position, row, accuracy in state["waiting"])
        self.num_solved = sum(known.pass_rate >= self._solved for known in self._rows.values())
