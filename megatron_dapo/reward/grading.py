"""From completions to a graded group: decode and verify each as it ends, then shape the group's rewards."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dapo.reward.decoding import decoder_source
from megatron_dapo.reward.jobs import OUTCOMES, Grade, Outcome
from megatron_dapo.reward.overlong import LengthPenalty
from megatron_dapo.reward.pool import GradingPool
from megatron_dapo.types import Completion, Group, Prompt, Timing

if TYPE_CHECKING:
    from megatron_dapo.config import RewardConfig


class Grader:
    """Grades completions in a pool of processes, which starts with it and decodes them as `tokenizer` (of
    transformers) does. `longest`: rollout.max_tokens (the paper's L_max).

    `seconds` and `counts` may be read and reset from any thread while completions are graded.
    """

    def __init__(self, reward: RewardConfig, tokenizer: Any, *, longest: int) -> None:
        self._pool = GradingPool(
            reward.verifier,
            reward.workers,
            reward.timeout_s,
            decoder_source(tokenizer),
            rules=tuple(reward.rules),
            memory_bytes=int(reward.memory_gib * 2**30),
        )
        self._reward, self.length_penalty = reward, LengthPenalty(reward, longest)
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
            self._counts = dict.fromkeys(OUTCOMES, 0)

    async def grade(self, prompt: Prompt, completion: Completion) -> Grade:
        """Decode and grade one completion by its prompt's rule, or else reward.verifier; call it as soon as
        the completion has ended. RuntimeError if the grader is closed meanwhile, UserError if there is no
        such rule.
        """
        self._begin()
        grade = None
        try:
            grade = await self._pool.grade_tokens(
                completion.tokens, prompt.answer, rule=prompt.rule, row=partial(_row, prompt)
            )
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

        A reward is the score of the verifier plus weight x score of each further rule, 0 without a grade,
        plus the response's overlong penalty. Where there is more than one of them they are its reward_parts.
        """
        parts = [self._parts(c, grade) for c, grade in zip(completions, grades, strict=True)]
        return Group(
            prompt=prompt,
            completions=tuple(
                self._graded(c, grade, its) for c, grade, its in zip(completions, grades, parts, strict=True)
            ),
            correct=tuple(grade.correct for grade in grades),
            rewards=tuple(sum(its.values()) for its in parts),
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

    def _parts(self, completion: Completion, grade: Grade) -> dict[str, float]:
        """What its reward is the sum of, by name."""
        parts = {"verifier": grade.score}
        scores = grade.extra or (0.0,) * len(self._reward.rules)
        for (name, weight), score in zip(self._reward.rules.items(), scores, strict=True):
            parts[name] = weight * score
        if self._reward.overlong_cache:
            parts["overlong"] = self.length_penalty.of(len(completion.tokens))
        return parts

    def _graded(self, completion: Completion, grade: Grade, parts: dict[str, float]) -> Completion:
        if len(parts) > 1:
            completion = dataclasses.replace(completion, reward_parts=parts)
        if grade.correct is None or (self._reward.overlong_filter and completion.truncated):
            completion = _masked(completion)
        return completion


def _row(prompt: Prompt) -> dict[str, Any]:
    """The prompt's row of the data; what it lacks of rule, source and row is the prompt's."""
    fields = json.loads(prompt.fields) if prompt.fields else {}
    own = {"rule": prompt.rule, "source": prompt.source, "row": prompt.row}
    return {**own, **fields, "prompt": prompt.text, "answer": prompt.answer}


def _masked(completion: Completion) -> Completion:
    # One element seen R times: a mask that costs no memory.
    return dataclasses.replace(completion, trained=np.broadcast_to(np.False_, len(completion.tokens)))
