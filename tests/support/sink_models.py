"""Tiny checkpoints, and the parameters that sink tables and vLLM's own loaders make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_dapo.sync.sinks import SinkTable, fill
from support.models import SPECIAL_KEYS

# A vocabulary that no number of ranks divides; as many heads as the most ranks, fewer key/value heads.
SIZES = dict(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = dict(num_experts=8, moe_intermediate_size=16)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    tensors: dict[str, torch.Tensor]

    @property
    def facts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.facts.items()}


def make_checkpoint(folder: Path, arch: str, *, tied: bool, **changed: int) -> Checkpoint:
    """Random fp32 weights without a tokenizer, named as transformers saves them. changed: of SIZES and what
    comes with the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    special = SPECIAL_KEYS.get(arch, {}) | (EXPERTS if arch == "qwen3_moe" else {})
    sizes = SIZES | special | changed
    config = AutoConfig.for_model(arch, **sizes, tie_word_embeddings=tied, dtype="float32")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return Checkpoint(folder, load_file(folder / "model.safetensors"))


def differing(vllm_config: Any, table: SinkTable, tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """Parameters that `fill` makes other bits of than vLLM's own loader, on this (pretended) rank. Both start
    with NaN."""
    from megatron_dapo.sync.vllm.sinks_twin import build

    model: Any = build(vllm_config)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(torch.nan)
    ours = {name: parameter.data.clone() for name, parameter in parameters.items()}
    model.load_weights(iter(tensors.items()))
    fill(table, ours, tensors)
    for name, parameter in parameters.items():
        if not torch.equal(bits(parameter), bits(ours[name])):
            yield name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
