"""A small model whose slices can be counted by hand: its parameter names, made-up weights and shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, slices_of
from support.samples import make_spec


def small_model(**changed: Any) -> ModelSpec:
    """An untied Qwen2: 2 layers, 4 query heads and 2 key/value heads of 3 dimensions, 7 words."""
    values: dict[str, Any] = dict(
        architecture="Qwen2ForCausalLM",
        num_layers=2,
        hidden_size=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=3,
        ffn_size=10,
        vocab_size=7,
        qkv_bias=True,
    )
    return make_spec(**(values | changed))


def megatron_names(model: ModelSpec, *, transformer_engine: bool) -> list[str]:
    """Every parameter of the model, with global layer and expert numbers."""
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    if not model.tied:
        names.append("output_layer.weight")
    for i in range(model.num_layers):
        names += [f"decoder.layers.{i}.{name}" for name in _layer(model, transformer_engine)]
    return names


def _layer(model: ModelSpec, transformer_engine: bool) -> list[str]:
    names = ["self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
    if model.num_experts:
        expert = (
            "mlp.experts.linear_fc{k}.weight{e}"
            if transformer_engine
            else "mlp.experts.local_experts.{e}.linear_fc{k}.weight"
        )
        names += ["mlp.router.weight"]
        names += [expert.format(e=e, k=k) for e in range(model.num_experts) for k in (1, 2)]
    else:
        names += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    if model.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    if model.qkv_bias:
        names += ["self_attention.linear_qkv.bias"]
    if not transformer_engine:
        return [*names, "input_layernorm.weight", "pre_mlp_layernorm.weight"]
    mlp_norm = "pre_mlp_layernorm.weight" if model.num_experts else "mlp.linear_fc1.layer_norm_weight"
    return [*names, "self_attention.linear_qkv.layer_norm_weight", mlp_norm]


def make_weights(model: ModelSpec, dtype: str = "fp32", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values for every Hugging Face tensor, in the order of the checkpoint."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random).to(DTYPES[dtype])
        for name, shape in hf_shapes(model).items()
    }


def make_shards(
    model: ModelSpec, weights: Mapping[str, torch.Tensor], *, rank: int, tp: int, pp: int
) -> list[Shard]:
    """What one of tp x pp ranks would contribute: its stage's layers, its tensor-parallel part of each
    parameter, and, of parameters that all tensor-parallel ranks have alike, only the first rank's copy.

    Ranks are ordered as Megatron's: tensor-parallel neighbours first. Experts are split like everything else.
    Every shard ends in one row or column of NaN that has no slice, as the padding of a vocabulary.
    """
    tp_rank, stage = rank % tp, rank // tp
    shards = []
    for name in megatron_names(model, transformer_engine=False):
        if _stage(name, model, pp) != stage:
            continue
        slices = slices_of(name, model, tp=tp, tp_rank=tp_rank)
        replicated = name.endswith(("layernorm.weight", "router.weight"))
        if not slices or (replicated and tp_rank > 0):
            continue
        parts = [weights[s.hf].narrow(s.dim, s.hf_start, s.size) for s in slices]
        padding = torch.full_like(parts[0].narrow(slices[0].dim, 0, 1), float("nan"))
        shards.append(Shard(name, torch.cat([*parts, padding], dim=slices[0].dim), tuple(slices)))
    return shards


def _stage(name: str, model: ModelSpec, pp: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) * pp // model.num_layers
    return 0 if name.startswith("embedding") else pp - 1
