"""What travels between the stages of a step: frozen values, aligned by construction.

    Prompt -> Completion -> Group -> Sample -> Batch -> StepResult

Legend: P prompts, G completions per prompt, N samples, T tokens of all samples end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_dapo.report.metrics import Metric

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of the data stream.

    `position` counts prompts over the whole run (it grows across epochs), so it orders acceptance and seeds sampling;
    `row` is the index in the data file.
    """

    position: int
    row: int
    text: str
    answer: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response. `logprobs` are the engine's processed log-probabilities (temperature applied), nats."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    seed: int | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs):
            raise ValueError(f"Completion needs a log-probability per token, got {len(self.logprobs)} for {len(self.tokens)}")
        if not self.tokens:
            raise ValueError("Completion has no tokens; an engine returns at least the end-of-sequence token")

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All completions of one prompt with their grades.

    `correct` is the verifier's word alone; `rewards` are verifier score plus overlong penalty and never decide accuracy.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    correct: tuple[bool, ...]
    rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.completions), len(self.correct), len(self.rewards)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"Group streams must align and not be empty, got lengths {sorted(sizes)}")

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def weight_version(self) -> int:
        """The oldest policy that sampled any of it."""
        return min(c.weight_version for c in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training sequence: prompt and response end to end.

    `response_mask[t]` is true where token t is a response token that is trained on; `rollout_logprobs[t]` belongs to token t
    and is 0 elsewhere.
    """

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]
    rollout_logprobs: tuple[float, ...]
    advantage: float
    weight_version: int
    prompt_position: int

    def __post_init__(self) -> None:
        sizes = {len(self.tokens), len(self.response_mask), len(self.rollout_logprobs)}
        if len(sizes) != 1:
            raise ValueError(f"Sample streams must align, got lengths {sorted(sizes)}")
        if self.response_mask and self.response_mask[0]:
            raise ValueError("The first token of a Sample has no prediction; a prompt needs at least one token")


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """The samples of one optimizer update: `micro_batches[d][m]` holds the sample indices of data-parallel rank d, micro-batch m.

    Every rank has the same number of micro-batches (one may be empty). `num_tokens` counts the trained response tokens of
    all ranks: the one denominator of the loss.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int

    def __post_init__(self) -> None:
        if len({len(rank) for rank in self.micro_batches}) != 1:
            raise ValueError("MiniBatch needs the same number of micro-batches on every data-parallel rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All samples of a step as flat tensors, and which micro-batch of which rank trains on each.

    tokens_T int64, response_mask_T bool, rollout_logprobs_T float32, advantages_N float32, lengths of the N samples,
    fresh_N: sampled by the policy that is trained now, not carried over from an earlier step.
    imbalance: cost of the costliest data-parallel rank over the mean one, all updates together; 1 is perfect.
    fill: tokens of the samples over the budgets of all micro-batches.
    """

    tokens_T: torch.Tensor
    response_mask_T: torch.Tensor
    rollout_logprobs_T: torch.Tensor
    advantages_N: torch.Tensor
    fresh_N: torch.Tensor
    lengths: tuple[int, ...]
    mini_batches: tuple[MiniBatch, ...]
    imbalance: float
    fill: float

    def __post_init__(self) -> None:
        total = sum(self.lengths)
        for name in ("tokens_T", "response_mask_T", "rollout_logprobs_T"):
            if (size := getattr(self, name).numel()) != total:
                raise ValueError(f"Batch.{name} has {size} elements, the lengths add up to {total}")
        for name in ("advantages_N", "fresh_N"):
            if (size := getattr(self, name).numel()) != len(self.lengths):
                raise ValueError(f"Batch.{name} has {size} elements for {len(self.lengths)} samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the policy reports of one step, averaged over its updates by their trained tokens.

    A skipped update counts in `metrics["skipped_updates"]` and nowhere else. `warnings` are sentences for the console.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_updates: int
    num_micro_batches: int
    lr: float
    metrics: dict[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
