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


@dataclass(frozen=True, slots=True)
class Row:
    megatron: str
    hf: tuple[str, ...]
    split: Split


_L, _H = "decoder.layers.{i}.", "model.layers.{i}."
_QKV = tuple(_H + f"self_attn.{p}_proj." for p in "qkv")

ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_L + "input_layernorm.weight", (_H + "input_layernorm.weight",), "replicated"),
    Row(_L + "self_attention.linear_qkv.layer_norm_weight", (_H + "input_layernorm.weight",), "replicated"),
    Row(_L + "self_attention.linear_qkv.weight", tuple(n + "weight" for n in _QKV), "qkv"),
    Row(_L + "self_attention.linear_qkv.bias", tuple(n + "bias" for n in _QKV), "qkv"),
    Row(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "row"),
    Row(_L + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), "replicated"),
    Row(_L + "mlp.linear_fc1.layer_norm_weight", (_H + "post_attention_layernorm.weight",), "replicated"),
    Row(_L + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gate_up"),
    Row(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)
_BY_MEGATRON = {row.megatron: row for row in ROWS}
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def row_of(megatron_name: str, *, tied: bool = False) -> Row:
    """The row of a Megatron parameter (global layer number), with its layer filled in. Source: ROWS.

    With tied embeddings the output layer of a last pipeline stage is a second copy of the embedding.
    """
    layer = _LAYER.search(megatron_name)
    row = _BY_MEGATRON.get(_LAYER.sub("{i}", megatron_name))
    if row is None:
        raise ValueError(
            f"no Hugging Face name is known for the Megatron parameter {megatron_name!r}; add a Row to ROWS in megatron_dapo/bridge/names.py"
        )
    if tied and row.megatron == "output_layer.weight":
        row = _BY_MEGATRON["embedding.word_embeddings.weight"]
    number = layer.group() if layer else ""
    return Row(megatron_name, tuple(name.replace("{i}", number) for name in row.hf), row.split)


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
        shapes[prefix + "self_attn.o_proj.weight"] = (h, q)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        shapes[prefix + "mlp.gate_proj.weight"] = (model.ffn_size, h)
        shapes[prefix + "mlp.up_proj.weight"] = (model.ffn_size, h)
        shapes[prefix + "mlp.down_proj.weight"] = (h, model.ffn_size)
    shapes["model.norm.weight"] = (h,)
    if not model.tied:
        shapes["lm_head.weight"] = (model.vocab_size, h)
    return shapes
