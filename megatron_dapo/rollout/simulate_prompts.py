"""The simulated prompt stream: difficulties cycled in their order, and what sampling a prompt gives.

A response's length is log-normal, longer when it is wrong, and cut at rollout.max_tokens; a cut response
keeps its verdict, because a pass rate that was measured has counted it already.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dapo.batching.filtering import Window
from megatron_dapo.config import SamplingConfig
from megatron_dapo.errors import UserError
from megatron_dapo.types import Prompt

SEQUENTIAL_GROUPS = 50_000  # groups that the Monte Carlo of `sequential` accepts, about
SEQUENTIAL_PASSES = 500  # at most, over the beginning of the stream
SEQUENTIAL_CHUNK = 2048  # prompts that it draws at once, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """pass_rate: of one response. median_tokens, sigma: of a right response's log-normal length; a wrong
    one is `wrong_longer` times as long.
    """

    pass_rate: float
    median_tokens: float
    sigma: float = 0.7
    wrong_longer: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.pass_rate <= 1:
            raise UserError(f"pass_rate={self.pass_rate} must be between 0 and 1")
        for name in ("median_tokens", "wrong_longer"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if not self.sigma >= 0:
            raise UserError(f"sigma={self.sigma} must not be negative")


# (pass rate, median tokens): 41 % of groups of 16 are informative; mean response about 5,000 of at most
# 20,480 tokens; hard problems take longer.
MIXTURE = (
    (0.0, 4600),
    (0.3, 3450),
    (1.0, 1950),
    (0.02, 4400),
    (0.0, 4600),
    (0.6, 2800),
    (0.99, 2200),
    (0.1, 4050),
    (0.0, 4600),
    (0.9, 2450),
)
LONGEST_OF_MIXTURE = 20_480


def default_difficulties(max_tokens: int) -> list[Difficulty]:
    """The flagship's planned mixture, its lengths scaled to `max_tokens`."""
    scale = max_tokens / LONGEST_OF_MIXTURE
    return [
        Difficulty(pass_rate=rate, median_tokens=median * scale, sigma=0.7, wrong_longer=1.2)
        for rate, median in MIXTURE
    ]


def load_difficulties(file: Path) -> list[Difficulty]:
    """Rows of a JSONL file; further keys are ignored. UserError names the line."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {file}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            known = {key: float(row[key]) for key in Difficulty.__slots__ if key in row}
            rows.append(Difficulty(**known))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{file}, line {number}: {error}; a row is {{"pass_rate": 0.2, "median_tokens": 3000, '
                '"sigma": 0.8, "wrong_longer": 1.3}'
            ) from error
    if not rows:
        raise UserError(f"--prompts {file} has no rows; give at least one")
    return rows


class Stream(ABC):
    """The endless prompt stream, and the outcome of sampling any of its prompts.

    An outcome depends on seed, position and weight version alone: neither on the engine nor on how often a
    request was sent. pass_rates: of the stream's rows.
    """

    def __init__(self, pass_rates: Sequence[float], *, seed: int, max_tokens: int) -> None:
        self.pass_rates = list(pass_rates)
        self._seed, self._max_tokens, self._position = seed, max_tokens, 0

    @abstractmethod
    def _rows(self, begin: int, end: int) -> np.ndarray:
        """The rows of these positions, int64 [P]."""

    @abstractmethod
    def _draw(self, generator: np.random.Generator, row_P: np.ndarray, n: int) -> Any:
        """int64 lengths [P, n], bool verdicts [P, n]."""

    @abstractmethod
    def _prompt_tokens(self, row: int) -> int: ...

    def next(self) -> Prompt:
        """The next prompt. Its tokens only count: they are a range that begins at the position."""
        position, self._position = self._position, self._position + 1
        row = int(self._rows(position, position + 1)[0])
        tokens: Any = range(position, position + self._prompt_tokens(row))
        return Prompt(position=position, row=row, text="", answer="", tokens=tokens)

    def record(self, prompt: Prompt, accuracy: float) -> None:
        """The stream does not depend on what was sampled."""
        return

    def state(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = state["position"]

    def outcome(self, position: int, version: int, n: int) -> tuple[list[int], list[bool]]:
        """Response lengths and verdicts of `n` samples."""
        generator = np.random.default_rng((self._seed, position, version))
        lengths, right = self._draw(generator, self._rows(position, position + 1), n)
        return lengths[0].tolist(), right[0].tolist()

    def sequential(self, config: SamplingConfig, groups: int) -> dict[str, Any]:
        """What sampling one prompt after another trains on: from the beginning of the stream until `groups`
        groups are informative, again and again, by Monte Carlo.

        mean_tokens of their responses, share_by_pass_rate of the groups. Its random numbers are its own.
        """
        generator = np.random.default_rng((self._seed, 0x5E9))
        window = Window.of(config)
        size = config.samples_per_prompt
        accepts = np.array(
            [not config.dynamic or window.judge(k / size) == "accepted" for k in range(size + 1)]
        )
        by_row, tokens, accepted = np.zeros(len(self.pass_rates), int), 0, 0
        for _ in range(min(SEQUENTIAL_PASSES, math.ceil(SEQUENTIAL_GROUPS / groups))):
            missing, begin, barren = groups, 0, 0
            while missing and barren < 50:
                row_P = self._rows(begin, begin + min(SEQUENTIAL_CHUNK, 16 + 4 * missing))
                lengths, right = self._draw(generator, row_P, size)
                index = np.flatnonzero(accepts[right.sum(axis=1)])[:missing]
                by_row += np.bincount(row_P[index], minlength=len(by_row))
                tokens += int(lengths[index].sum())
                accepted, missing, begin = accepted + len(index), missing - len(index), begin + len(row_P)
                barren = 0 if len(index) else barren + 1
        return {
            "mean_tokens": tokens / (accepted * size) if accepted else None,
            "share_by_pass_rate": shares(zip(self.pass_rates, by_row.tolist(), strict=True)),
        }


class PlannedStream(Stream):
    """Difficulties cycled in their order, every response drawn on its own."""

    def __init__(
        self, difficulties: Sequence[Difficulty], *, seed: int, max_tokens: int, prompt_tokens: int
    ) -> None:
        fields = ("pass_rate", "median_tokens", "sigma", "wrong_longer")
        rate, median, sigma, longer = (np.array([getattr(d, f) for d in difficulties]) for f in fields)
        super().__init__(rate.tolist(), seed=seed, max_tokens=max_tokens)
        self._rate, self._log_median, self._sigma, self._longer = rate, np.log(median), sigma, longer
        self._tokens_of_prompts = prompt_tokens

    def _rows(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end) % len(self._rate)

    def _prompt_tokens(self, row: int) -> int:
        return self._tokens_of_prompts

    def _draw(self, generator: np.random.Generator, row_P: np.ndarray, n: int) -> Any:
        right = generator.random((len(row_P), n)) < self._rate[row_P, None]
        log_length = self._log_median[row_P, None] + self._sigma[row_P, None] * generator.standard_normal(
            (len(row_P), n)
        )
        length = np.exp(log_length) * np.where(right, 1.0, self._longer[row_P, None])
        return np.clip(np.rint(length), 1, self._max_tokens).astype(np.int64), right


def shares(counts: Any) -> dict[str, float]:
    """(pass rate, number) pairs as shares by pass rate, sorted; empty if there are none."""
    by_rate: dict[float, int] = {}
    for rate, number in counts:
        by_rate[rate] = by_rate.get(rate, 0) + number
    total = sum(by_rate.values())
    return {f"{rate:g}": by_rate[rate] / total for rate in sorted(by_rate)} if total else {}
