"""Group-relative advantages: A_i = (R_i - mean(R)) / (std(R) + 1e-6), sample standard deviation (arXiv
2503.14476, eq. 9).
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence

import torch

from megatron_dapo.types import Completion, Group, Prompt, Sample

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float], normalize: str = "std") -> list[float]:
    """Advantages of the G completions of a prompt; `normalize` is 'std' or 'none' (only minus the mean)."""
    mean = statistics.fmean(rewards)
    if normalize == "none":
        return [reward - mean for reward in rewards]
    if normalize != "std":
        raise ValueError(f"objective.advantage={normalize!r} must be 'std' or 'none'")
    scale = statistics.stdev(rewards, xbar=mean) + STD_EPS
    return [(reward - mean) / scale for reward in rewards]


def with_advantages(groups: Sequence[Group], *, normalize: str = "std") -> list[Sample]:
    """Training samples of the groups, in order. All tokens of a response have its advantage.

    A response that is masked (`Completion.trained`) still counts in its group's mean and deviation, but not
    one without a grade.
    """
    responses = [
        (group.prompt, completion, advantage)
        for group in groups
        for completion, advantage in zip(group.completions, _advantages(group, normalize), strict=True)
    ]
    return make_samples(responses)


def _advantages(group: Group, normalize: str) -> list[float]:
    """0 for completions without a grade, and where fewer than two have one."""
    graded = [n for n, correct in enumerate(group.correct) if correct is not None]
    advantages = [0.0] * len(group.correct)
    if len(graded) >= 2:
        of_graded = group_advantages([group.rewards[n] for n in graded], normalize)
        for number, advantage in zip(graded, of_graded, strict=True):
            advantages[number] = advantage
    return advantages


def make_samples(responses: Sequence[tuple[Prompt, Completion, float]]) -> list[Sample]:
    """A Sample of each prompt, completion and advantage: prompt and response end to end. Prompt tokens are
    never trained on.

    The samples are views of flat tensors: thousands of small tensors would take longer than all the rest.
    """
    if not responses:
        return []
    lengths = [len(prompt.tokens) + len(completion.tokens) for prompt, completion, _ in responses]
    tokens, masks, logprobs = bytearray(), bytearray(), bytearray()
    for prompt, completion, _ in responses:
        before = len(prompt.tokens)
        tokens += array("i", prompt.tokens).tobytes() + completion.tokens.tobytes()
        masks += bytes(before) + completion.trained.tobytes()
        logprobs += bytes(4 * before) + completion.logprobs.tobytes()
    advantages = torch.tensor([advantage for _, _, advantage in responses], dtype=torch.float32)
    flat = (
        torch.frombuffer(tokens, dtype=torch.int32),
        torch.frombuffer(masks, dtype=torch.bool),
        torch.frombuffer(logprobs, dtype=torch.float32),
        advantages.repeat_interleave(torch.tensor(lengths)),
    )
    streams = zip(*(tensor.split(lengths) for tensor in flat), strict=True)
    return [
        Sample(
            tokens=tokens_L,
            response_mask=mask_L,
            rollout_logprobs=logprobs_L,
            advantages=advantages_L,
            prompt_position=prompt.position,
            number=completion.number,
            seed=completion.seed,
            weight_version=completion.weight_version,
        )
        for (prompt, completion, _), (tokens_L, mask_L, logprobs_L, advantages_L) in zip(
            responses, streams, strict=True
        )
    ]
