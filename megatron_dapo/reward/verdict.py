"""What a rule says of a response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Decision = Literal["correct", "wrong", "no_answer"]


class Verdict(NamedTuple):
    """decision: no_answer is a wrong response in which no answer was found. score: what it is worth, +1 or -1
    unless the rule knows degrees. extracted: what was taken for the answer.
    """

    decision: Decision
    score: float
    extracted: str | None = None


Row = Mapping[str, Any]  # the prompt's row of the data, with at least `prompt` and `answer`
Rule = Callable[[str, str, Row], Verdict]


def verdict(correct: bool, extracted: str | None) -> Verdict:
    """+1 or -1; a wrong one without an answer is `no_answer`."""
    if correct:
        return Verdict("correct", 1.0, extracted)
    return Verdict("no_answer" if extracted is None else "wrong", -1.0, extracted)
