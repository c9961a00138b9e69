"""One factory for each value that travels between the stages, with defaults that a test overrides by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.types import Completion, Group, Prompt, Sample


def make_prompt(position: int = 0, **changed: Any) -> Prompt:
    values = {"row": position, "text": f"p{position}", "answer": "1", "tokens": (1, 2)}
    return Prompt(position=position, **(values | changed))


def make_completion(tokens: Sequence[int] = (5,), *, version: int = 0, **changed: Any) -> Completion:
    """All tokens trained on, log-probability -1 each, sampled by one version, unless said otherwise."""
    values = {
        "logprobs": [-1.0] * len(tokens),
        "trained": [True] * len(tokens),
        "versions": ((version, len(tokens)),),
        "finish_reason": "stop",
    } | changed
    return Completion(
        tokens=np.asarray(tokens, dtype=np.int32),
        logprobs=np.asarray(values.pop("logprobs"), dtype=np.float32),
        trained=np.asarray(values.pop("trained"), dtype=bool),
        **values,
    )


def make_group(
    prompt: Prompt | None = None,
    correct: int = 1,
    *,
    size: int = 4,
    version: int = 0,
    lengths: Sequence[int] | None = None,
    rewards: Sequence[float] | None = None,
) -> Group:
    """`size` completions of one token each (or of the given lengths), the first `correct` of them right."""
    lengths = [1] * size if lengths is None else list(lengths)
    grades = tuple(i < correct for i in range(len(lengths)))
    return Group(
        prompt=prompt or make_prompt(),
        completions=tuple(
            make_completion((5,) * n, version=version, number=i) for i, n in enumerate(lengths)
        ),
        correct=grades,
        rewards=tuple(1.0 if grade else -1.0 for grade in grades) if rewards is None else tuple(rewards),
    )


def make_sample(
    tokens: Sequence[int], prompt_length: int, *, advantage: float | Sequence[float] = 1.0, **changed: Any
) -> Sample:
    """The tokens behind the prompt are trained on; their engine log-probabilities are -1 unless
    `rollout_logprobs` says.
    """
    response = len(tokens) - prompt_length
    mask = changed.pop("response_mask", [False] * prompt_length + [True] * response)
    logprobs = changed.pop("rollout_logprobs", [0.0] * prompt_length + [-1.0] * response)
    advantages = [advantage] * len(tokens) if isinstance(advantage, (int, float)) else advantage
    values = {"prompt_position": 0, "number": 0, "weight_version": 0} | changed
    return Sample(
        tokens=torch.tensor(list(tokens), dtype=torch.int32),
        response_mask=torch.tensor(list(mask), dtype=torch.bool),
        rollout_logprobs=torch.tensor(list(logprobs), dtype=torch.float32),
        advantages=torch.tensor(list(advantages), dtype=torch.float32),
        **values,
    )


def make_samples(num: int = 12, *, seed: int = 0, vocab: int = 100, longest: int = 70) -> list[Sample]:
    """Samples of very unequal lengths; the fourth is masked out of the loss whole, as overlong filtering
    does.
    """
    draw = random.Random(seed)
    samples = []
    for i in range(num):
        prompt, response = (
            draw.randint(2, 12),
            1 if i == 1 else longest if i == 2 else draw.randint(1, longest),
        )
        samples.append(
            make_sample(
                tokens=[draw.randrange(3, vocab) for _ in range(prompt + response)],
                prompt_length=prompt,
                response_mask=[False] * prompt + [i != 3] * response,
                rollout_logprobs=[0.0] * prompt + [-4 + draw.random() for _ in range(response)],
                advantage=draw.gauss(0.4, 1.0),
                prompt_position=i // 4,
                number=i % 4,
            )
        )
    return samples


def make_spec(**changed: Any) -> ModelSpec:
    """The smallest dense model: every size is 1."""
    values: dict[str, Any] = dict(
        architecture="LlamaForCausalLM",
        num_layers=1,
        hidden_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        ffn_size=1,
        vocab_size=1,
        tied=False,
        qkv_bias=False,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_factor=None,
        max_positions=100,
        eos_token_ids=(2,),
    )
    return ModelSpec(**(values | changed))
