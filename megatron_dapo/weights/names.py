"""Megatron <-> Hugging Face parameter names as a table; a name that is not in it raises and says what to add.

A row says which Hugging Face tensors one Megatron parameter is made of, their shapes and how tensor
parallelism splits it. Both of Megatron's layer specs are covered: the local one and TransformerEngine's,
which fuses layer norms with the linear layers behind them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dapo.model_spec import ModelSpec

Split = Literal["replicated", "vocab", "row", "qkv", "gate_up"]
# How tensor-parallel ranks share a parameter: all have the whole of it, or rows of the vocabulary, columns
# (Megatron's row-parallel layers), whole key/value groups, the same rows of two stacked matrices.


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of Megatron parameter. `{i}` in a name stands for the layer's number, `{e}` for the expert's.

    megatron: its names, in the local layers and, where that differs, in TransformerEngine's.
    hf: the tensors it is made of, name -> shape, as names of sizes in ModelSpec.
    needs: the field or property of ModelSpec that a model must have for the parameter to exist.
    expert: split over the expert-parallel ranks, and by expert_tensor_parallel instead of tensor_parallel.
    """

    megatron: tuple[str, ...]
    hf: Mapping[str, tuple[str, ...]]
    split: Split
    needs: str | None = None
    expert: bool = False


# prefixes of a layer's parameters, in Megatron and in Hugging Face checkpoints
_L, _H = "decoder.layers.{i}.", "model.layers.{i}."
_HIDDEN, _MLP_IN, _MLP_OUT = ("hidden_size",), ("ffn_size", "hidden_size"), ("hidden_size", "ffn_size")
_ATTENTION, _EXPERT = _H + "self_attn.", _H + "mlp.experts.{e}."
_QKV = {"q": "query_size", "k": "key_size", "v": "key_size"}

ROWS = (
    Row(
        ("embedding.word_embeddings.weight",),
        {"model.embed_tokens.weight": ("vocab_size", "hidden_size")},
        "vocab",
    ),
    Row(
        (_L + "input_layernorm.weight", _L + "self_attention.linear_qkv.layer_norm_weight"),
        {_H + "input_layernorm.weight": _HIDDEN},
        "replicated",
    ),
    Row(
        (_L + "self_attention.linear_qkv.weight",),
        {f"{_ATTENTION}{p}_proj.weight": (size, "hidden_size") for p, size in _QKV.items()},
        "qkv",
    ),
    Row(
        (_L + "self_attention.linear_qkv.bias",),
        {f"{_ATTENTION}{p}_proj.bias": (size,) for p, size in _QKV.items()},
        "qkv",
        needs="qkv_bias",
    ),
    Row(
        (_L + "self_attention.q_layernorm.weight",),
        {_ATTENTION + "q_norm.weight": ("head_dim",)},
        "replicated",
        needs="qk_norm",
    ),
    Row(
        (_L + "self_attention.k_layernorm.weight",),
        {_ATTENTION + "k_norm.weight": ("head_dim",)},
        "replicated",
        needs="qk_norm",
    ),
    Row(
        (_L + "self_attention.linear_proj.weight",),
        {_ATTENTION + "o_proj.weight": ("hidden_size", "query_size")},
        "row",
    ),
    Row(
        (_L + "pre_mlp_layernorm.weight", _L + "mlp.linear_fc1.layer_norm_weight"),
        {_H + "post_attention_layernorm.weight": _HIDDEN},
        "replicated",
    ),
    Row(
        (_L + "mlp.linear_fc1.weight",),
        {_H + "mlp.gate_proj.weight": _MLP_IN, _H + "mlp.up_proj.weight": _MLP_IN},
        "gate_up",
        needs="dense",
    ),
    Row((_L + "mlp.linear_fc2.weight",), {_H + "mlp.down_proj.weight": _MLP_OUT}, "row", needs="dense"),
    Row(
        (_L + "mlp.router.weight",),
        {_H + "mlp.gate.weight": ("num_experts", "hidden_size")},
        "replicated",
        needs="num_experts",
    ),
    Row(
        (_L + "mlp.experts.local_experts.{e}.linear_fc1.weight", _L + "mlp.experts.linear_fc1.weight{e}"),
        {_EXPERT + "gate_proj.weight": _MLP_IN, _EXPERT + "up_proj.weight": _MLP_IN},
        "gate_up",
        needs="num_experts",
        expert=True,
    ),
    Row(
        (_L + "mlp.experts.local_experts.{e}.linear_fc2.weight", _L + "mlp.experts.linear_fc2.weight{e}"),
        {_EXPERT + "down_proj.weight": _MLP_OUT},
        "row",
        needs="num_experts",
        expert=True,
    ),
    Row(("decoder.final_layernorm.weight",), {"model.norm.weight": _HIDDEN}, "replicated"),
    Row(("output_layer.weight",), {"lm_head.weight": ("vocab_size", "hidden_size")}, "vocab", needs="untied"),
)
_BY_MEGATRON = {name: row for row in ROWS for name in row.megatron}
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
# an expert's number: the local layers are named by it, TransformerEngine's weights end in it
EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


def row_of(megatron_name: str, *, tied: bool = False) -> Row:
    """The row of a Megatron parameter (global layer and expert numbers), with its numbers filled in.

    With tied embeddings the output layer of a last pipeline stage is a second copy of the embedding.
    """
    layer, expert = _LAYER.search(megatron_name), EXPERT.search(megatron_name)
    row = _BY_MEGATRON.get(EXPERT.sub("{e}", _LAYER.sub("{i}", megatron_name)))
    if row is None:
        raise ValueError(
            f"no Hugging Face name is known for the Megatron parameter {megatron_name!r}; add a Row to ROWS "
            f"in megatron_dapo/weights/names.py"
        )
    if tied and megatron_name == "output_layer.weight":
        row = _BY_MEGATRON["embedding.word_embeddings.weight"]
    i, e = layer.group() if layer else "", expert.group() if expert else ""
    return replace(
        row, megatron=(megatron_name,), hf={name.format(i=i, e=e): sizes for name, sizes in row.hf.items()}
    )


def hf_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint: embedding, layers, norm, head."""
    rows = [row for row in ROWS if row.needs is None or getattr(model, row.needs)]
    shapes = {}
    for in_layer, members in itertools.groupby(rows, lambda row: row.megatron[0].startswith(_L)):
        per_layer = [
            (name, e, model.shape(sizes))
            for row in members
            for e in range(model.num_experts if row.expert else 1)
            for name, sizes in row.hf.items()
        ]
        for i in range(model.num_layers if in_layer else 1):
            shapes |= {name.format(i=i, e=e): shape for name, e, shape in per_layer}
    return shapes
