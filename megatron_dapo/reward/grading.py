"""From completions to a graded group: decode and verify each as it ends, then shape the group's rewards."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dapo.reward.decoding import decoder_source
from megatron_dapo.reward.overlong import overlong_penalty
from megatron_dapo.reward.pool import Grade, GradingPool, Outcome
from megatron_dapo.types import Completion, Group, Prompt, Timing

if TYPE_CHECKING:
    from megatron_dapo.config import RewardConfig


SCORES = {True: 1.0, False: -1.0, None: 0.0}  # by the verifier's word


class Grader:
    """Grades completions in a pool of processes, which starts with it and decodes them as `tokenizer` (of
    transformers) does. `longest`: rollout.max_tokens (the paper's L_max).

    `seconds` and `counts` may be read and reset from any thread while completions are graded.
    """

    def __init__(self, reward: RewardConfig, tokenizer: Any, *, longest: int) -> None:
        self._pool = GradingPool(reward.verifier, reward.workers, reward.timeout_s, decoder_source(tokenizer))
        self._reward, self._longest = reward, longest
        self._lock = threading.Lock()  # guards the four below
        self._waiting = 0  # completions
        self._since = 0.0  # when the first of them came, or reset() was called; of use while some wait
        self._seconds = 0.0
        self._counts: dict[Outcome, int] = {}
        self.reset()

    @property
    def seconds(self) -> float:
        """Wall seconds since `reset` in which at least one completion waited for its grade."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._waiting else 0.0)

    @property
    def counts(self) -> dict[Outcome, int]:
        """Completions since `reset` by what became of their grade. One that is not waited for is not
        counted.
        """
        with self._lock:
            return dict(self._counts)

    def reset(self) -> None:
        """Set `seconds` and `counts` to 0, for the step that begins."""
        with self._lock:
            self._seconds, self._since = 0.0, time.perf_counter()
            self._counts = {"graded": 0, "timeout": 0, "error": 0}

    async def grade(self, prompt: Prompt, completion: Completion) -> Grade:
        """Decode and verify one completion; call it as soon as the completion has ended. RuntimeError if the
        grader is closed meanwhile.
        """
        self._begin()
        grade = None
        try:
            grade = await self._pool.grade_tokens(completion.tokens, prompt.answer)
            return grade
        finally:
            self._end(grade)

    def group(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        grades: Sequence[Grade],
        timing: Timing | None = None,
    ) -> Group:
        """The group of a prompt, `grades` in the order of its completions. Masked out are responses whose
        grade timed out or crashed, and with reward.overlong_filter truncated ones.

        A reward is +1 or -1 by the verifier's word, 0 without one, plus the response's overlong penalty.
        """
        graded = list(zip(completions, grades, strict=True))
        return Group(
            prompt=prompt,
            completions=tuple(_masked(c) if self._is_masked(c, grade) else c for c, grade in graded),
            correct=tuple(grade.correct for grade in grades),
            rewards=tuple(SCORES[grade.correct] + self._penalty(c) for c, grade in graded),
            timing=timing,
        )

    def close(self) -> None:
        """Kill the workers; grades still waited for raise RuntimeError."""
        self._pool.close()

    def _begin(self) -> None:
        with self._lock:
            if not self._waiting:
                self._since = time.perf_counter()
            self._waiting += 1

    def _end(self, grade: Grade | None) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._seconds += time.perf_counter() - self._since
            if grade is not None:
                self._counts[grade.outcome] += 1

    def _penalty(self, completion: Completion) -> float:
        return overlong_penalty(len(completion.tokens), self._longest, self._reward.overlong_cache)

    def _is_masked(self, completion: Completion, grade: Grade) -> bool:
        return grade.correct is None or (self._reward.overlong_filter and completion.truncated)


def _masked(completion: Completion) -> Completion:
    # One element seen R times: a mask that costs no memory.
    return dataclasses.replace(completion, trained=np.broadcast_to(np.False_, len(completion.tokens)))
