"""Which groups a step trains on: dynamic sampling's window, and how `sampling.adaptive` moves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dapo.batching.filtering import Window, ladder, metric_of, next_level
from megatron_dapo.config import SamplingConfig
from megatron_dapo.types import Group, GroupFacts


@dataclass(slots=True)
class GroupFilter:
    """Judges groups. level: of the window that the next step begins with; 0 is the configured one, the last
    is (0, 1) exclusive. Without `sampling.adaptive` there is the configured one alone.
    """

    config: SamplingConfig
    level: int = 0
    _windows: list[Window] = field(init=False)
    _running: int = 0  # level of the running step

    def __post_init__(self) -> None:
        window = Window.of(self.config)
        self._windows = ladder(window) if self.config.adaptive else [window]

    @property
    def window(self) -> Window:
        """Of the running step."""
        return self._windows[self._running]

    def begin_step(self) -> None:
        self._running = min(self.level, len(self._windows) - 1)

    def widen(self) -> bool:
        """Go on with the next wider window; False if there is none."""
        if self._running + 1 == len(self._windows):
            return False
        self._running += 1
        return True

    def verdict(self, result: Group | GroupFacts) -> str:
        """By the window of the running step."""
        if isinstance(result, GroupFacts):
            return result.verdict  # no window accepts it, see `kept_of`
        return self._judge(result, self.window) if self.config.dynamic else "accepted"

    def kept_of(self, group: Group) -> Group | GroupFacts:
        """The group, or its facts alone if no window that a step may come to accepts it."""
        if not self.config.dynamic or any(self._judge(group, w) == "accepted" for w in self._windows):
            return group
        return GroupFacts.of(group, self._judge(group, self._windows[0]))

    def end_step(self, consumed: Sequence[Group | GroupFacts]) -> int:
        """Choose the next step's window by the groups that this step has consumed; how many of them it
        accepts.
        """
        accuracies = [result.accuracy for result in consumed]
        self.level = next_level(self._windows, self._running, accuracies, self.config.adaptive_share)
        self.begin_step()
        return sum(self.verdict(result) == "accepted" for result in consumed)

    def _judge(self, group: Group, window: Window) -> str:
        return window.judge(group.accuracy, metric_of(group, self.config.metric))
