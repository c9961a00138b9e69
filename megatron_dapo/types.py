"""What travels between the stages of a step: frozen values, aligned by construction.

    Prompt -> Completion -> Group -> Sample -> Batch -> UpdateResult -> StepResult

Legend: N samples, T tokens of all samples end to end, L tokens of one sequence, R tokens of one response.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import torch

from megatron_dapo.metrics import Metric

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length"]
# (weight version, number of tokens it sampled), in the order of the tokens
VersionRuns = tuple[tuple[int, int], ...]


class Stream(StrEnum):
    """A float32 value per token that a loss may need beside the log-probabilities of the policy as it
    is now.
    """

    ROLLOUT_LOGPROBS = "rollout_logprobs"  # of the engine that sampled the token
    OLD_LOGPROBS = "old_logprobs"  # of the policy before the first update of the step
    REFERENCE_LOGPROBS = "reference_logprobs"  # of a frozen reference model
    VALUES = "values"  # of a value model, for the text before the token
    RETURNS = "returns"  # what those values are fitted to
    MARGINS = "margins"  # of the pair of responses that the token's response is in (DPO)
    LM_WEIGHTS = "lm_weights"  # what a token's log-probability counts in objective.lambda_lm's term
    HIGH_COVARIANCE = "high_covariance"  # 1: objective.covariance holds this token back
    KEPT = "kept"  # 0: masked by a rule that looks at all tokens of the step


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of the data stream.

    `position` counts prompts over the whole run (it grows across epochs), so it orders acceptance and seeds
    sampling; `row` is the index in the data, all sources end to end. `rule`: the reward rule that its row
    names. `source`: which of several data sources it is from. `fields`: what the row has beside prompt and
    answer, as the text of a JSON object, "" for nothing; rollout files lack it.
    """

    position: int
    row: int
    text: str
    answer: str
    tokens: tuple[int, ...]
    rule: str | None = None
    source: str | None = None
    fields: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled response of R tokens.

    tokens: int32 [R]. logprobs: float32 [R], the engine's processed log-probabilities (temperature applied),
    nats. trained: bool [R], false where a token is not trained on (a masked response; later the output of a
    tool); where all are alike it may be one element seen R times, which cannot be written to. versions: runs
    of the weight versions that sampled the tokens. number: which of its prompt's completions this is.
    reward_parts: the rewards that make up its reward, by name; empty where there is only one.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    trained: np.ndarray
    finish_reason: FinishReason
    versions: VersionRuns
    number: int = 0
    seed: int | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (("tokens", "int32"), ("logprobs", "float32"), ("trained", "bool")):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"Completion.{name} must be {dtype} [R], got {array.dtype} {list(array.shape)}"
                )
        sizes = {len(self.tokens), len(self.logprobs), len(self.trained), sum(n for _, n in self.versions)}
        if len(sizes) != 1:
            raise ValueError(
                "Completion needs a log-probability, a mask and a weight version per token, "
                f"got lengths {sorted(sizes)}"
            )
        if not len(self.tokens):
            raise ValueError("Completion has no tokens; an engine returns at least the end-of-sequence token")

    def __eq__(self, other: object) -> bool:
        """Equal in every bit."""
        if not isinstance(other, Completion):
            return NotImplemented
        mine, theirs = ([getattr(c, f.name) for f in dataclasses.fields(c)] for c in (self, other))
        return all(
            a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b
            for a, b in zip(mine, theirs, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def weight_version(self) -> int:
        """The oldest policy that sampled any of its tokens."""
        return min(version for version, _ in self.versions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partial:
    """The beginning of a response that still runs: R tokens so far, R may be 0.

    tokens int32 [R], logprobs float32 [R], versions as in Completion. finish_reason: None while it runs.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: VersionRuns
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where and when a group was made, seconds of one clock: sent to `engine`, answered in full, graded."""

    engine: str
    sent: float
    answered: float
    graded: float


def accuracy_of(correct: Iterable[bool | None]) -> float:
    """The share of True among True and False; NaN if all are None."""
    grades = [grade for grade in correct if grade is not None]
    return sum(grades) / len(grades) if grades else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All completions of one prompt with their grades.

    `correct` is the verifier's word alone, None where there is none: such a completion is not trained on and
    counts nowhere. `rewards` are verifier score plus overlong penalty and never decide accuracy.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    correct: tuple[bool | None, ...]
    rewards: tuple[float, ...]
    timing: Timing | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        sizes = {len(self.completions), len(self.correct), len(self.rewards)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"Group streams must align and not be empty, got lengths {sorted(sizes)}")

    @property
    def accuracy(self) -> float:
        """Of the graded completions; NaN if there are none."""
        return accuracy_of(self.correct)

    @property
    def weight_version(self) -> int:
        """The oldest policy that sampled any of it."""
        return min(c.weight_version for c in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """What is kept of a group that is not trained on, and what the simulator needs of every group.

    lengths: response tokens of each completion, G of them like correct and truncated. verdict: accepted,
    all_correct, all_wrong, outside_window or ungraded (batching/filtering.py).
    """

    position: int
    row: int
    prompt_tokens: int
    lengths: tuple[int, ...]
    correct: tuple[bool | None, ...]
    truncated: tuple[bool, ...]
    weight_version: int
    verdict: str
    source: str | None = None
    timing: Timing | None = field(default=None, compare=False)

    @property
    def accuracy(self) -> float:
        """As of the group."""
        return accuracy_of(self.correct)

    @classmethod
    def of(cls, group: Group, verdict: str) -> GroupFacts:
        return cls(
            position=group.prompt.position,
            row=group.prompt.row,
            prompt_tokens=len(group.prompt.tokens),
            lengths=tuple(len(completion.tokens) for completion in group.completions),
            correct=group.correct,
            truncated=tuple(completion.truncated for completion in group.completions),
            weight_version=group.weight_version,
            verdict=verdict,
            source=group.prompt.source,
            timing=group.timing,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The groups that one step trains on and what happened to all others, by reason.

    window: both ends of what was accepted, in the unit of sampling.metric.
    """

    groups: tuple[Group, ...]
    sampled: tuple[GroupFacts, ...]  # of every group that finished in this step, whatever became of it
    counts: dict[str, int]
    window: tuple[float, float] = (0.0, 1.0)
    exhausted: bool = False  # the data has ended and nothing is left over


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One training sequence of L tokens: prompt and response end to end.

    tokens: int32 [L]. response_mask: bool [L], true for response tokens that are trained on.
    rollout_logprobs, advantages: float32 [L]; what they hold outside the mask is never read. streams: more
    values of the objective, float32 [L]; all samples of a step have the same. The other fields say which
    completion it is: position of the prompt, number of the completion in its group, its seed, the oldest
    weight version that sampled any token.
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    prompt_position: int
    number: int
    weight_version: int
    seed: int | None = None
    streams: Mapping[Stream, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = (self.tokens, self.response_mask, self.rollout_logprobs, self.advantages)
        streams = (*own, *self.streams.values())
        sizes = {stream.size(0) for stream in streams}  # len() of a tensor takes several times as long
        if len(sizes) != 1:
            raise ValueError(f"Sample streams must align, got lengths {sorted(sizes)}")
        if max(sizes) and self.response_mask[0]:
            raise ValueError(
                "The first token of a Sample has no prediction; a prompt needs at least one token"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The samples of one optimizer update: `micro_batches[d][m]` holds the sample indices of data-parallel
    rank d, micro-batch m.

    Every rank has the same number of micro-batches (one may be empty). `num_tokens` counts the trained
    response tokens of all ranks, `denominator` what the loss is divided by (Objective.denominator): both are
    of the whole mini-batch, also in the part of one rank.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int
    denominator: int

    def __post_init__(self) -> None:
        if len({len(rank) for rank in self.micro_batches}) != 1:
            raise ValueError("MiniBatch needs the same number of micro-batches on every data-parallel rank")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples of a step as flat tensors, and which micro-batch of which data-parallel rank trains on each.

    tokens_T int32, response_mask_T bool, advantages_T float32; `streams` float32 [T] by name, always with
    rollout_logprobs. Of the N samples: lengths, and as int64 the prompt's position, the number of the
    completion in its group, its seed (-1: none) and its oldest weight version; fresh_N: every token was
    sampled by the weights that are trained now. imbalance: cost of the costliest data-parallel rank over the
    mean one, all updates together; 1 is perfect. fill: tokens of the samples over the budgets of all
    micro-batches. Both describe the whole step, also in a part.
    """

    tokens_T: torch.Tensor
    response_mask_T: torch.Tensor
    advantages_T: torch.Tensor
    streams: Mapping[Stream, torch.Tensor]
    lengths: tuple[int, ...]
    prompt_N: torch.Tensor
    number_N: torch.Tensor
    seed_N: torch.Tensor
    version_N: torch.Tensor
    fresh_N: torch.Tensor
    mini_batches: tuple[MiniBatch, ...]
    imbalance: float
    fill: float

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        by_token = {name: getattr(self, name) for name in ("tokens_T", "response_mask_T", "advantages_T")}
        for name, tensor in (
            by_token | {f"streams[{name}]": tensor for name, tensor in self.streams.items()}
        ).items():
            if tensor.numel() != total:
                raise ValueError(f"Batch.{name} has {tensor.numel()} elements, the lengths add up to {total}")
        for name in ("prompt_N", "number_N", "seed_N", "version_N", "fresh_N"):
            if (size := getattr(self, name).numel()) != len(self.lengths):
                raise ValueError(f"Batch.{name} has {size} elements for {len(self.lengths)} samples")

    def with_stream(self, name: Stream, values_T: torch.Tensor) -> Batch:
        """The same batch with one more stream, float32 [T]."""
        return dataclasses.replace(self, streams={**self.streams, name: values_T})

    def part(self, dp_rank: int) -> Batch:
        """What data-parallel rank `dp_rank` trains on: its samples alone, renumbered in their order; one rank
        in `micro_batches`; the denominators of the whole.
        """
        mine = sorted(i for mini in self.mini_batches for micro in mini.micro_batches[dp_rank] for i in micro)
        number_of = {i: k for k, i in enumerate(mine)}
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        index_T = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine] or [torch.arange(0)])
        index_N = torch.tensor(mine, dtype=torch.int64)
        by_token = {k: getattr(self, k)[index_T] for k in ("tokens_T", "response_mask_T", "advantages_T")}
        by_sample = {
            k: getattr(self, k)[index_N] for k in ("prompt_N", "number_N", "seed_N", "version_N", "fresh_N")
        }
        minis = (
            dataclasses.replace(
                mini,
                micro_batches=(
                    tuple(tuple(number_of[i] for i in micro) for micro in mini.micro_batches[dp_rank]),
                ),
            )
            for mini in self.mini_batches
        )
        return dataclasses.replace(
            self,
            **by_token,
            **by_sample,
            streams={name: values_T[index_T] for name, values_T in self.streams.items()},
            lengths=tuple(self.lengths[i] for i in mine),
            mini_batches=tuple(minis),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What the policy reports of one optimizer update, the same on every rank.

    loss: over the denominator. num_tokens: response tokens in the loss, over all ranks. A skipped update has
    loss and grad_norm NaN and no tokens. `warnings` are sentences for the console.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_micro_batches: int
    lr: float
    skipped: bool = False
    metrics: dict[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The updates of one step together: means weighted by their tokens, the learning rate of the last.

    A skipped update counts in `metrics["skipped_updates"]` and nowhere else.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_updates: int
    num_micro_batches: int
    lr: float
    metrics: dict[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
