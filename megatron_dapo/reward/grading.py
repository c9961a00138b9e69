"""From completions to a graded group: decode, verify, shape the reward."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dapo.reward.overlong import overlong_penalty
from megatron_dapo.reward.pool import GradingPool
from megatron_dapo.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from megatron_dapo.config import RewardConfig


class Grader:
    """Grades groups in a pool of processes, which starts with it. `longest`: rollout.max_tokens (the paper's
    L_max).

    seconds: spent waiting for grades, all groups together; whoever reports it sets it back to 0.
    """

    def __init__(self, reward: RewardConfig, tokenizer: Any, *, longest: int) -> None:
        self.seconds = 0.0
        self.pool = GradingPool(reward.verifier, reward.workers, reward.timeout_s)
        self._reward, self._tokenizer, self._longest = reward, tokenizer, longest

    async def grade(self, prompt: Prompt, completions: list[Completion]) -> Group:
        """The group with texts, grades and rewards; truncated responses masked out with
        reward.overlong_filter.

        A reward is +1 or -1 by the verifier's word, plus the overlong penalty of the response.
        """
        tokens = [completion.tokens.tolist() for completion in completions]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        began = time.perf_counter()
        grades = await self.pool.grade(texts, prompt.answer)
        self.seconds += time.perf_counter() - began
        return Group(
            prompt=prompt,
            completions=tuple(self._finished(c, text) for c, text in zip(completions, texts, strict=True)),
            correct=tuple(grade.correct for grade in grades),
            rewards=tuple(
                (1.0 if grade.correct else -1.0) + self._penalty(completion)
                for completion, grade in zip(completions, grades, strict=True)
            ),
        )

    def close(self) -> None:
        self.pool.close()

    def _penalty(self, completion: Completion) -> float:
        return overlong_penalty(len(completion.tokens), self._longest, self._reward.overlong_cache)

    def _finished(self, completion: Completion, text: str) -> Completion:
        if not (self._reward.overlong_filter and completion.truncated):
            return dataclasses.replace(completion, text=text)
        untrained = np.zeros(len(completion.tokens), dtype=bool)
        return dataclasses.replace(completion, text=text, trained=untrained)
