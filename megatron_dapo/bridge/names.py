"""Megatron <-> Hugging Face parameter names, as data. Total: an unknown name raises and says which row to add.

A row says which Hugging Face tensors one Megatron parameter is made of and how tensor parallelism splits it. Both of
Megatron's layer specs are covered: the local one and TransformerEngine's, which names the layer norms by the linear layer
they are fused with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_dapo.bridge.hf import HFModel

Split = Literal["replicated", "vocab", "row", "qkv", "gate_up"]
# How tensor-parallel ranks share a parameter: all have the whole of it, or rows of the vocabulary, columns (Megatron's row-parallel
# layers), whole key/value groups, the same rows of two stacked matrices.


@dataclass(frozen=True, slots=True)
class Row:
    megatron: str
    hf: tuple[str, ...]
    split: Split
    expert: bool = False  # split over the expert-parallel ranks, and by expert_tensor_parallel instead of tensor_parallel


_L, _H = "decoder.layers.{i}.", "model.layers.{i}."
_E = _H + "mlp.experts.{e}."
_QKV = tuple(_H + f"self_attn.{p}_proj." for p in "qkv")

ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_L + "input_layernorm.weight", (_H + "input_layernorm.weight",), "replicated"),
    Row(_L + "self_attention.linear_qkv.layer_norm_weight", (_H + "input_layernorm.weight",), "replicated"),
    Row(_L + "self_attention.linear_qkv.weight", tuple(n + "weight" for n in _QKV), "qkv"),
    Row(_L + "self_attention.linear_qkv.bias", tuple(n + "bias" for n in _QKV), "qkv"),
    Row(_L + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), "replicated"),
    Row(_L + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), "replicated"),
    Row(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "row"),
    Row(_L + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), "replicated"),
    Row(_L + "mlp.linear_fc1.layer_norm_weight", (_H + "post_attention_layernorm.weight",), "replicated"),
    Row(_L + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gate_up"),
    Row(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
    Row(_L + "mlp.router.weight", (_H + "mlp.gate.weight",), "replicated"),
    Row(
        _L + "mlp.experts.local_experts.{e}.linear_fc1.weight", (_E + "gate_proj.weight", _E + "up_proj.weight"), "gate_up", True
    ),
    Row(_L + "mlp.experts.local_experts.{e}.linear_fc2.weight", (_E + "down_proj.weight",), "row", True),
    Row(_L + "mlp.experts.linear_fc1.weight{e}", (_E + "gate_proj.weight", _E + "up_proj.weight"), "gate_up", True),
    Row(_L + "mlp.experts.linear_fc2.weight{e}", (_E + "down_proj.weight",), "row", True),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)
_BY_MEGATRON = {row.megatron: row for row in ROWS}
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


def row_of(megatron_name: str, *, tied: bool = False) -> Row:
    """The row of a Megatron parameter (global layer and expert numbers), with its numbers filled in. Source: ROWS.

    With tied embeddings the output layer of a last pipeline stage is a second copy of the embedding.
    """
    layer, expert = _LAYER.search(megatron_name), EXPERT.search(megatron_name)
    row = _BY_MEGATRON.get(EXPERT.sub("{e}", _LAYER.sub("{i}", megatron_name)))
    if row is None:
        raise ValueError(
            f"no Hugging Face name is known for the Megatron parameter {megatron_name!r}; add a Row to ROWS in megatron_dapo/bridge/names.py"
        )
    if tied and row.megatron == "output_layer.weight":
        row = _BY_MEGATRON["embedding.word_embeddings.weight"]
    i, e = layer.group() if layer else "", expert.group() if expert else ""
    names = tuple(name.replace("{i}", i).replace("{e}", e) for name in row.hf)
    return Row(megatron_name, names, row.split, row.expert)


def hf_shapes(model: HFModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, layer by layer (embeddings first, head last)."""
    q, kv, h = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, h)}
    for i in range(model.num_layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (h,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[prefix + f"self_attn.{name}_proj.weight"] = (rows, h)
            if model.qkv_bias:
                shapes[prefix + f"self_attn.{name}_proj.bias"] = (rows,)
        if model.qk_norm:
            shapes |= {prefix + f"self_attn.{name}_norm.weight": (model.head_dim,) for name in "qk"}
        shapes[prefix + "self_attn.o_proj.weight"] = (h, q)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        if model.num_experts:
            shapes[prefix + "mlp.gate.weight"] = (model.num_experts, h)
        for mlp in [f"mlp.experts.{e}." for e in range(model.num_experts)] or ["mlp."]:
            shapes[prefix + mlp + "gate_proj.weight"] = (model.ffn_size, h)
            shapes[prefix + mlp + "up_proj.weight"] = (model.ffn_size, h)
            shapes[prefix + mlp + "down_proj.weight"] = (h, model.ffn_size)
    shapes["model.norm.weight"] = (h,)
    if not model.tied:
        shapes["lm_head.weight"] = (model.vocab_size, h)
    return shapes
