"""The soft overlong penalty of DAPO (arXiv 2503.14476, equation 13), and how strong it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_dapo.types import Group

if TYPE_CHECKING:
    from megatron_dapo.config import RewardConfig


def overlong_penalty(num_tokens: int, max_tokens: int, cache: int) -> float:
    """A response of `num_tokens` tokens: 0 up to `max_tokens - cache`, then down in a line to -1 at
    `max_tokens`, -1 beyond. `cache=0` turns it off: always 0.
    """
    if cache == 0:
        return 0.0
    excess = num_tokens - (max_tokens - cache)
    return -min(max(excess, 0), cache) / cache if excess > 0 else 0.0


class LengthPenalty:
    """What a response's length adds to its reward: factor x overlong penalty.

    With reward.overlong_target the factor follows the share of truncated responses. Each step moves it by
    overlong_gain x (share - target), within 0 to overlong_factor_max: dual ascent on the constraint that at
    most the target is truncated.
    """

    def __init__(self, reward: RewardConfig, max_tokens: int) -> None:
        self.factor = reward.overlong_factor
        self._reward, self._max_tokens = reward, max_tokens

    def of(self, num_tokens: int) -> float:
        """For a response of so many tokens."""
        return self.factor * overlong_penalty(num_tokens, self._max_tokens, self._reward.overlong_cache)

    def end_step(self, groups: Sequence[Group]) -> None:
        """Move the factor by the groups that a step trains on; it holds for what is graded from now on."""
        truncated = [completion.truncated for group in groups for completion in group.completions]
        target, gain, most = (
            self._reward.overlong_target,
            self._reward.overlong_gain,
            self._reward.overlong_factor_max,
        )
        if target is not None and truncated:
            moved = self.factor + gain * (sum(truncated) / len(truncated) - target)
            self.factor = min(max(moved, 0.0), most)

    def load_state(self, factor: float) -> None:
        """Go on from a checkpoint's factor. One that does not move is the configuration's."""
        if self._reward.overlong_target is not None:
            self.factor = factor
