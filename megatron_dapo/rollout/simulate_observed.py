"""The prompt stream of a run that was made, drawn again: lengths and verdicts as its groups had them.

R rows of the data, N groups, G responses of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dapo.rollout.simulate_prompts import Stream
from megatron_dapo.types import GroupFacts

FEW = 10  # cut responses of a run, below which their pass rate says nothing and they count as wrong
HALF = 0.5
CHUNK = 1024  # positions whose rows are drawn together


class ObservedStream(Stream):
    """A bootstrap of whole groups: each position is one of the run's prompts, at random, and what it gives
    is one of the groups that this prompt had. With other samples per prompt than the run had, responses are
    drawn from a group one by one.

    longest: the cap of the run. Under a shorter one responses are cut and keep their verdicts; where the
    run's cut responses were right less than half as often as the others, so many of them stay right that
    this share is the same. Under a longer one those that
    the run has cut go on and keep their verdicts: each further token is the last one with the chance that
    the run's tokens had (a geometric tail).
    """

    def __init__(self, groups: Sequence[GroupFacts], *, longest: int, seed: int, max_tokens: int) -> None:
        groups = sorted(groups, key=lambda group: group.row)
        self._begin_R, self._number_R = np.unique(
            [group.row for group in groups], return_index=True, return_counts=True
        )[1:]
        self._length_NG, self._right_NG, self._cut_NG = (
            np.array([getattr(group, name) for group in groups])
            for name in ("lengths", "correct", "truncated")
        )
        self._prompt_tokens_R = [groups[begin].prompt_tokens for begin in self._begin_R]
        rates = np.add.reduceat(self._right_NG.mean(axis=1), self._begin_R) / self._number_R
        super().__init__(rates.tolist(), seed=seed, max_tokens=max_tokens)
        cut, ended = self._right_NG[self._cut_NG], self._right_NG[~self._cut_NG]
        self._longest, self._last_token = longest, ended.size / self._length_NG.sum()
        rate_if_cut = cut.mean() if cut.size >= FEW else 0.0
        share = rate_if_cut / ended.mean() if ended.any() else 1.0
        self._stays_right = share if share < HALF else 1.0
        self._drawn: dict[int, np.ndarray] = {}

    def _rows(self, begin: int, end: int) -> np.ndarray:
        chunks = [self._chunk(number) for number in range(begin // CHUNK, (end - 1) // CHUNK + 1)]
        first = begin // CHUNK * CHUNK
        return np.concatenate(chunks)[begin - first : end - first]

    def _chunk(self, number: int) -> np.ndarray:
        if number not in self._drawn:
            generator = np.random.default_rng((self._seed, 0x0B5, number))
            self._drawn[number] = generator.choice(
                len(self._number_R), CHUNK, p=self._number_R / self._number_R.sum()
            )
        return self._drawn[number]

    def _prompt_tokens(self, row: int) -> int:
        return max(1, self._prompt_tokens_R[row])

    def _draw(self, generator: np.random.Generator, row_P: np.ndarray, n: int) -> Any:
        shape = len(row_P), n
        group_P = self._begin_R[row_P] + generator.integers(self._number_R[row_P])
        size = self._length_NG.shape[1]
        pick_Pn = np.broadcast_to(np.arange(n), shape) if n == size else generator.integers(size, size=shape)
        lengths, right, cut = (
            values[group_P[:, None], pick_Pn] for values in (self._length_NG, self._right_NG, self._cut_NG)
        )
        if self._max_tokens > self._longest and cut.any() and self._last_token > 0:
            more = generator.geometric(self._last_token, size=shape)
            lengths = lengths + np.where(cut, more, 0)
        over = lengths > self._max_tokens
        if over.any():
            lengths = np.minimum(lengths, self._max_tokens)
            right = right & (~over | (generator.random(shape) < self._stays_right))
        return lengths, right
