"""How many prompts to have under way: an estimate from the verdicts of recent steps.

What is estimated here decides only how much is sampled ahead, never which groups a batch holds (collect.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 0.5  # weight of a step's verdicts against those of the step after it: the policy changes
OPTIMISM = 2.0  # standard deviations of the posterior: what is not known yet is not launched for yet
MARGIN = 1.0  # standard deviations of the number of informative groups that is launched for


@dataclass(slots=True)
class PassRate:
    """The share of groups that are informative, as a Beta posterior over the verdicts of recent steps.

    informative, finished: verdicts of earlier steps, each step's weighing MEMORY times the next one's. The
    prior is Beta(1, 1): one informative and one other group.
    """

    informative: float = 0.0
    finished: float = 0.0

    def end_step(self, informative: int, finished: int) -> None:
        """Add the verdicts of a step that is over."""
        self.informative = MEMORY * (self.informative + informative)
        self.finished = MEMORY * (self.finished + finished)

    def mean(self, informative: int, finished: int) -> float:
        """The expected share; the arguments are verdicts of the running step."""
        return (1 + self.informative + informative) / (2 + self.finished + finished)

    def optimistic(self, informative: int, finished: int) -> float:
        """OPTIMISM standard deviations above the mean, at most 1.

        A launch cannot be taken back: with few verdicts this stays high, so that the number of launches comes
        to its goal from below while verdicts come in.
        """
        mean, weight = self.mean(informative, finished), 2 + self.finished + finished
        return min(1.0, mean + OPTIMISM * math.sqrt(mean * (1 - mean) / (weight + 1)))


def prompts_needed(groups: int, rate: float) -> int:
    """The fewest prompts F whose informative groups are `groups`, MARGIN standard deviations on the safe
    side: F rate - MARGIN sqrt(F rate (1 - rate)) >= groups. A quadratic equation in sqrt(F).
    """
    if groups <= 0:
        return 0
    noise = MARGIN * math.sqrt(rate * (1 - rate))
    root = (noise + math.sqrt(noise * noise + 4 * rate * groups)) / (2 * rate)
    return math.ceil(root * root - 1e-9)


def running_needed(
    *, goal: int, rate: float, accepted: int, informative: int, behind: int, running: int
) -> int:
    """How many requests have to run now, so that `goal` groups of the stream are informative in the end.

    accepted: informative groups known in stream order. behind: groups finished behind a prompt that still
    runs; informative: all finished ones that are, those included. Which groups finish first depends on their
    lengths, so at first those behind count by the pass rate, and by their verdicts the more of them are in:
    were the uninformative ones the short ones, counting verdicts at once would launch far too many.
    """
    by_rate = prompts_needed(goal - accepted, rate) - behind
    by_verdict = prompts_needed(goal - informative, rate)
    trust = (behind / (behind + running)) ** 2 if running else 1.0
    return math.ceil(trust * by_verdict + (1 - trust) * by_rate)
