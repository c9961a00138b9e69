"""What a server sampled as completions, whichever route it came by; RequestFailed where it is not what was
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.rollout.wire import LabelRuns, TokensFrame, WireError
from megatron_dapo.types import Completion, FinishReason, Partial, VersionRuns

NOT_A_LOGPROB = -9999.0  # what vLLM's JSON says for NaN and -inf
TRAINED = np.ones((), dtype=bool)


def frames_of(answer: dict[str, Any], *, n: int, url: str) -> list[TokensFrame]:
    """The `n` sequences of vLLM's JSON answer, in order. `url` is for error messages."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != n:
        raise RequestFailed(f"{url} returned {len(choices)} completions of {n}", "incomplete")
    try:
        return [_frame(choice, index) for index, choice in enumerate(choices)]
    except WireError as error:
        raise RequestFailed(f"{url} returned {error}", "incomplete") from error


def _frame(choice: dict[str, Any], index: int) -> TokensFrame:
    content = (choice.get("logprobs") or {}).get("content") or ()
    spans = choice.get("weight_versions") or ()
    return TokensFrame(
        index=index,
        finish_reason=choice["finish_reason"],
        tokens=np.asarray(choice["token_ids"], dtype=np.int32),
        logprobs=np.asarray([entry["logprob"] for entry in content], dtype=np.float32),
        runs=tuple((span["version"], span["end"] - span["start"]) for span in spans),
    )


class Responses:
    """The `n` responses to one prompt as their frames arrive, each after the beginning that it goes on from.

    `began` is empty or holds n beginnings; those that have finished, or are `max_tokens` long, arrive at
    once. `arrived` gets each completion when it is there. The seed of number i is `seed + i`.
    `weight_version` is for tokens that the server names no version for, `url` for error messages.
    """

    def __init__(
        self,
        n: int,
        *,
        began: Sequence[Partial],
        max_tokens: int,
        seed: int | None,
        weight_version: int,
        url: str,
        arrived: Callable[[Completion], None] | None,
    ) -> None:
        if began and len(began) != n:
            raise ValueError(f"began has {len(began)} beginnings for n={n} responses; give one for each")
        self._n, self._began, self._seed, self._version = n, began, seed, weight_version
        self._url, self._arrived = url, arrived
        self._done: dict[int, Completion] = {}
        for number, partial in enumerate(began):
            if partial.finish_reason is not None or len(partial.tokens) >= max_tokens:
                self._add(number, partial, partial.finish_reason or "length")
        self.numbers = [number for number in range(n) if number not in self._done]  # that are asked for

    @property
    def beginnings(self) -> list[Partial]:
        """Of the numbers that are asked for; empty if all begin with the prompt."""
        return [self._began[number] for number in self.numbers] if self._began else []

    def add(self, frame: TokensFrame) -> None:
        """Take a response that has ended. RequestFailed if something is wrong with it."""
        if _finish_reason(frame) is None:
            raise RequestFailed(
                f"{self._url} ended a request early (finish reason {frame.finish_reason!r})", "aborted"
            )
        if not len(frame.tokens) or not 0 <= frame.index < len(self.numbers):
            raise RequestFailed(
                f"{self._url} returned {len(frame.tokens)} tokens of response {frame.index} of "
                f"{len(self.numbers)}",
                "incomplete",
            )
        if not (frame.logprobs > NOT_A_LOGPROB).all():  # false for NaN too
            raise RequestFailed(
                f"{self._url} returned log-probabilities that are not numbers; its weights are likely broken",
                "not_a_number",
            )
        partial = self._partial(frame)
        assert partial.finish_reason is not None
        self._add(self.numbers[frame.index], partial, partial.finish_reason)

    def whole(self) -> list[Completion]:
        """All of them, by number. RequestFailed if one has not arrived."""
        if len(self._done) != self._n:
            raise RequestFailed(
                f"{self._url} returned {len(self._done)} completions of {self._n}", "incomplete"
            )
        return [self._done[number] for number in range(self._n)]

    def partials(self, frames: Iterable[TokensFrame]) -> tuple[Partial, ...]:
        """What each of the n has so far, where `frames` are of those that were asked for."""
        sampled = {self.numbers[frame.index]: self._partial(frame) for frame in frames}
        return tuple(sampled.get(number) or self._began[number] for number in range(self._n))

    def _add(self, number: int, partial: Partial, reason: FinishReason) -> None:
        self._done[number] = completion = Completion(
            tokens=partial.tokens,
            logprobs=partial.logprobs,
            trained=np.broadcast_to(TRAINED, len(partial.tokens)),  # takes no memory
            finish_reason=reason,
            versions=partial.versions,
            number=number,
            seed=None if self._seed is None else self._seed + number,
        )
        if self._arrived is not None:
            self._arrived(completion)

    def _partial(self, frame: TokensFrame) -> Partial:
        tokens, logprobs = frame.tokens, frame.logprobs
        versions = _version_runs(frame.runs, len(tokens), self._version)
        began = self._began[self.numbers[frame.index]] if self._began else None
        if began is not None and len(began.tokens):
            tokens = np.concatenate([began.tokens, tokens])
            logprobs = np.concatenate([began.logprobs, logprobs])
            versions = _joined([*began.versions, *versions])
        reason = _finish_reason(frame)
        return Partial(tokens=tokens, logprobs=logprobs, versions=versions, finish_reason=reason)


def _finish_reason(frame: TokensFrame) -> FinishReason | None:
    """None for a sequence that has not ended, or was ended by other things than its own tokens."""
    reason = frame.finish_reason
    return reason if reason == "stop" or reason == "length" else None


def _version_runs(runs: LabelRuns, num_tokens: int, weight_version: int) -> VersionRuns:
    """Runs by number; tokens without a label that is ours are of `weight_version`."""
    if not runs:
        return ((weight_version, num_tokens),) if num_tokens else ()
    return _joined([(int(label) if label.isdigit() else weight_version, count) for label, count in runs])


def _joined(runs: Sequence[tuple[int, int]]) -> VersionRuns:
    """The same runs, neighbours of one version as one."""
    joined: list[tuple[int, int]] = []
    for version, count in runs:
        if joined and joined[-1][0] == version:
            joined[-1] = (version, joined[-1][1] + count)
        elif count:
            joined.append((version, count))
    return tuple(joined)
