"""How far a model's next-token distributions are from another's on a run's own rollouts, by transformers, in
fp32, with weights rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_TOKENS = 256  # whose logits are computed at once


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt and a response to it."""

    tokens: tuple[int, ...]
    num_prompt_tokens: int


def load(folder: Path) -> Any:
    """The model of a Hugging Face folder, its weights rounded to bf16, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()


def load_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The model of `folder` with other weights, under the names of checkpoints."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def hidden_states(model: Any, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    """Of each rollout, at the positions that predict its response: [response tokens, hidden]."""
    found = []
    for rollout in rollouts:
        outputs = model.model(torch.tensor([rollout.tokens]), use_cache=False)
        found.append(outputs.last_hidden_state[0, rollout.num_prompt_tokens - 1 : -1].clone())
    return found


@torch.no_grad()
def mean_kl(head: Any, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """KL(before || after) of the distributions that `head` (hidden states -> logits) makes, nats a token."""
    total, count = 0.0, 0
    for old, new in zip(
        torch.cat(list(before)).split(_TOKENS), torch.cat(list(after)).split(_TOKENS), strict=True
    ):
        logprobs, others = (torch.log_softmax(head(states), dim=-1) for states in (old, new))
        total += float((logprobs.exp() * (logprobs - others)).sum(dtype=torch.float64))
        count += len(old)
    return total / count
