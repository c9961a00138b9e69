"""vLLM's answer to a generate request as completions; RequestFailed where it is not what was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dapo.rollout.errors import RequestFailed
from megatron_dapo.types import Completion, VersionRuns

NOT_A_LOGPROB = -9999.0  # what vLLM sends for NaN and -inf


def completions_of(
    answer: dict[str, Any], *, n: int, seed: int | None, weight_version: int, url: str
) -> list[Completion]:
    """The `n` completions of one prompt, in order; the seed of number i is `seed + i`.

    `weight_version` is for tokens that the server names no version for; `url` is for error messages.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != n:
        raise RequestFailed(f"{url} returned {len(choices)} completions of {n}", "incomplete")
    return [
        _completion(choice, i, weight_version, None if seed is None else seed + i, url)
        for i, choice in enumerate(choices)
    ]


def _completion(
    choice: dict[str, Any], number: int, weight_version: int, seed: int | None, url: str
) -> Completion:
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise RequestFailed(f"{url} ended a request early (finish reason {reason!r})", "aborted")
    tokens = np.asarray(choice["token_ids"], dtype=np.int32)
    logprobs = np.asarray([entry["logprob"] for entry in choice["logprobs"]["content"]], dtype=np.float32)
    if not (logprobs > NOT_A_LOGPROB).all():  # false for NaN too
        raise RequestFailed(
            f"{url} returned log-probabilities that are not numbers; its weights are likely broken",
            "not_a_number",
        )
    versions = _version_runs(choice.get("weight_versions"), len(tokens), weight_version)
    if not 0 < len(tokens) == len(logprobs) == sum(count for _, count in versions):
        raise RequestFailed(
            f"{url} returned {len(tokens)} tokens, {len(logprobs)} log-probabilities, versions {versions}",
            "incomplete",
        )
    return Completion(
        tokens=tokens,
        logprobs=logprobs,
        trained=np.ones(len(tokens), dtype=bool),
        finish_reason=reason,
        versions=versions,
        number=number,
        seed=seed,
    )


def _version_runs(spans: list[dict[str, Any]] | None, num_tokens: int, weight_version: int) -> VersionRuns:
    """vLLM's spans [start, end) of one label each; tokens without a label that is ours are of
    `weight_version`.
    """
    if not spans:
        return ((weight_version, num_tokens),)
    labelled = [(span["version"], span["end"] - span["start"]) for span in spans]
    return tuple((int(label) if label.isdigit() else weight_version, count) for label, count in labelled)
