"""DAPO without Megatron: transformers and plain torch in float64, one sequence at a time, written from the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dapo.types import Sample

EPS_LOW, EPS_HIGH, DUAL_CLIP, CLIP_GRAD, BETAS, WEIGHT_DECAY = 0.2, 0.28, 10.0, 1.0, (0.9, 0.999), 0.1


def load(folder: Path | str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # tiny models on shared cores: threads only wait for each other
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


def logprobs(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it: [length - 1]."""
    tokens = sample.tokens.long()
    logits = model(tokens[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def token_losses(logprobs: torch.Tensor, old: torch.Tensor, advantage: float) -> torch.Tensor:
    """-J of each token, by cases of the advantage's sign instead of by minima."""
    ratio = (logprobs - old).exp()
    if advantage >= 0:
        return -advantage * ratio.clamp(max=1 + EPS_HIGH)
    return -advantage * ratio.clamp(min=1 - EPS_LOW, max=DUAL_CLIP)


def sample_losses(
    model: torch.nn.Module, samples: Sequence[Sample], old: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Losses of the trained tokens, one tensor per sample. `old` holds [length] per sample, by token."""
    losses = []
    for sample, old_T in zip(samples, old, strict=True):
        mask = sample.response_mask[1:]
        losses.append(token_losses(logprobs(model, sample)[mask], old_T[1:][mask], advantage_of(sample)))
    return losses


def advantage_of(sample: Sample) -> float:
    """The one advantage of all tokens of the sample."""
    (advantage,) = set(sample.advantages.tolist())
    return advantage


class Trainer:
    """AdamW with clipping of the global norm; biases and norms do not decay, as in Megatron."""

    def __init__(
        self, folder: Path | str, *, lr: float, eps: float, stored: torch.dtype = torch.float32
    ) -> None:
        self.model = load(folder, stored).double()
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=eps)

    def update(self, samples: Sequence[Sample], old: Sequence[torch.Tensor]) -> tuple[float, float]:
        """Loss (mean over all trained tokens of the samples) and gradient norm before clipping."""
        losses = torch.cat(sample_losses(self.model, samples, old))
        loss = losses.sum() / len(losses)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self.model.parameters()]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP_GRAD / (norm + 1e-6)))
        self.optimizer.step()
        return float(loss.detach()), norm

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the last update, clipped."""
        return by_checkpoint_name(
            {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return by_checkpoint_name({name: p.detach() for name, p in self.model.named_parameters()})


def by_checkpoint_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers stacks a layer's experts in memory; checkpoints hold them one by one."""
    by_name: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, stacked, kind = name.partition(".experts.")
        if not stacked:
            by_name[name] = tensor
        for e, expert in enumerate(tensor if stacked else ()):
            parts = (
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
                if kind == "gate_up_proj"
                else [(kind, expert)]
            )
            by_name |= {f"{layer}.experts.{e}.{part}.weight": matrix for part, matrix in parts}
    return by_name
