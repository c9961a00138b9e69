"""Advantages of a prompt's completions from their rewards R, and training samples that carry them.

    std             (R - mean) / (std + 1e-6) in the group, sample deviation   (arXiv 2402.03300, 2503.14476)
    none            R - mean                                                   (arXiv 2503.20783)
    leave_one_out   R - mean of the others                                     (arXiv 2402.14740)
    pass_rate       (correct - pass rate) / pass rate, of the verifier alone   (arXiv 2602.02710)
    batch_std       (R - mean) / (std of all rewards of the batch + 1e-6)      (arXiv 2508.08221)
    batch_whitened  R - mean, whitened over the trained tokens of the batch    (arXiv 2501.03262)

The batch is the step's. A response that is masked (`Completion.trained`) still counts in its group's mean and
deviation, but not one without a grade: its advantage is 0, as all are where fewer than two have one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_dapo.errors import UserError
from megatron_dapo.types import Completion, Group, Prompt, Sample, Stream

STD_EPS = 1e-6
OF_BATCH = ("batch_std", "batch_whitened")


def group_advantages(rewards: Sequence[float], advantage: str = "std") -> list[float]:
    """Advantages of the G >= 2 completions of a prompt; of those of the batch what one group says: R - mean.
    With 'pass_rate' the rewards are 1 and 0.
    """
    mean = statistics.fmean(rewards)
    if advantage in ("none", *OF_BATCH):
        return [reward - mean for reward in rewards]
    if advantage == "leave_one_out":
        others = len(rewards) / (len(rewards) - 1)
        return [others * (reward - mean) for reward in rewards]
    if advantage == "pass_rate":
        return [(reward - mean) / mean if mean else 0.0 for reward in rewards]
    if advantage != "std":
        raise ValueError(f"objective.advantage={advantage!r} is not a kind of advantage")
    scale = statistics.stdev(rewards, xbar=mean) + STD_EPS
    return [(reward - mean) / scale for reward in rewards]


def with_advantages(
    groups: Sequence[Group],
    *,
    advantage: str = "std",
    each_reward: bool = False,
    reward_weights: Mapping[str, float] | None = None,
) -> list[Sample]:
    """Training samples of the groups, in order. All tokens of a response have its advantage.

    each_reward: one advantage for each of `Completion.reward_parts`, which are added with `reward_weights` (1
    where a name is missing) and whitened over the batch's responses: GDPO (arXiv 2601.05242).
    """
    responses = [(group.prompt, completion) for group in groups for completion in group.completions]
    graded = [correct is not None for group in groups for correct in group.correct]
    if each_reward:
        values = _of_each_reward(groups, advantage, reward_weights or {})
        values = _whitened(values, [float(known) for known in graded])
    else:
        values = [
            value for group in groups for value in _in_group(group, _rewards(group, advantage), advantage)
        ]
    if advantage == "batch_std":
        rewards = [reward for group in groups for reward in group.rewards]
        known = [reward for reward, is_graded in zip(rewards, graded, strict=True) if is_graded]
        scale = (statistics.stdev(known) if len(known) > 1 else 0.0) + STD_EPS
        values = [value / scale for value in values]
    if advantage == "batch_whitened":
        tokens = [float(completion.trained.sum()) for _, completion in responses]
        values = _whitened(values, [n * known for n, known in zip(tokens, graded, strict=True)])
    return make_samples(
        [(prompt, completion, value) for (prompt, completion), value in zip(responses, values, strict=True)]
    )


def with_lm_weights(
    samples: Sequence[Sample], groups: Sequence[Group], denominator: Callable[[Sequence[Sample]], int]
) -> list[Sample]:
    """The samples of the groups with Stream.LM_WEIGHTS: for correct responses what makes the sum of weighted
    terms over the step's `denominator` their own mean, 0 for the others.
    """
    correct = [is_correct is True for group in groups for is_correct in group.correct]
    right = [sample for sample, is_correct in zip(samples, correct, strict=True) if is_correct]
    count = denominator(right) if right else 0
    weight = denominator(samples) / count if count else 0.0
    lengths = [len(sample.tokens) for sample in samples]
    weights_T = (weight * torch.tensor(correct).float()).repeat_interleave(torch.tensor(lengths))
    return [
        dataclasses.replace(sample, streams={**sample.streams, Stream.LM_WEIGHTS: weights_L})
        for sample, weights_L in zip(samples, weights_T.split(lengths), strict=True)
    ]


def _rewards(group: Group, advantage: str) -> Sequence[float]:
    return [float(bool(correct)) for correct in group.correct] if advantage == "pass_rate" else group.rewards


def _in_group(group: Group, rewards: Sequence[float], advantage: str) -> list[float]:
    """0 for completions without a grade, and where fewer than two have one."""
    graded = [n for n, correct in enumerate(group.correct) if correct is not None]
    advantages = [0.0] * len(group.correct)
    if len(graded) >= 2:
        of_graded = group_advantages([rewards[n] for n in graded], advantage)
        for number, value in zip(graded, of_graded, strict=True):
            advantages[number] = value
    return advantages


def _of_each_reward(groups: Sequence[Group], advantage: str, weights: Mapping[str, float]) -> list[float]:
    """The weighted sum over the rewards of their advantages in the group, for every completion.

    UserError when graded completions do not have the same rewards, or none, and for weights of others.
    """
    graded = [
        completion
        for group in groups
        for completion, correct in zip(group.completions, group.correct, strict=True)
        if correct is not None
    ]
    names = {frozenset(completion.reward_parts) for completion in graded}
    if len(names) != 1 or not (found := sorted(*names)):
        raise UserError(
            f"objective.normalize_rewards=each needs the same rewards for every response, found "
            f"{sorted(sorted(some) for some in names)}; configure several or use normalize_rewards=sum"
        )
    if unknown := sorted(weights.keys() - set(found)):
        raise UserError(
            f"objective.reward_weights names {', '.join(unknown)}; the rewards are {', '.join(found)}"
        )
    values: list[float] = []
    for group in groups:
        of_names = [
            [
                weights.get(name, 1.0) * value
                for value in _in_group(
                    group, [c.reward_parts.get(name, 0.0) for c in group.completions], advantage
                )
            ]
            for name in found
        ]
        values += [math.fsum(column) for column in zip(*of_names, strict=True)]
    return values


def _whitened(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """(value - mean) / (std + 1e-6), sample deviation of values that count `weights` times; 0 where that is
    0.
    """
    count = math.fsum(weights)
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / max(count, 1.0)
    squares = math.fsum(w * (v - mean) ** 2 for v, w in zip(values, weights, strict=True))
    scale = math.sqrt(squares / max(count - 1, 1.0)) + STD_EPS
    return [(v - mean) / scale if w else 0.0 for v, w in zip(values, weights, strict=True)]


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
