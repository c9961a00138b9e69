"""Where each shard lies in the checkpoint: by hand for a small model, and every element exactly once for others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_names import MODEL

from megatron_dapo.bridge.names import hf_shapes
from megatron_dapo.bridge.plan import Piece, padded_vocab, pieces

L0, H0 = "decoder.layers.0.", "model.layers.0."


def slices(name: str, tp: int, tp_rank: int, model=MODEL) -> list[tuple[str, int, int, int, int]]:
    found = pieces(name, model, tp=tp, tp_rank=tp_rank)
    return [(p.hf.removeprefix(H0), p.dim, p.hf_start, p.start, p.size) for p in found]


# The model has 4 query heads and 2 key/value heads of 3 dimensions: each of two ranks holds one group (2 queries, 1 key, 1 value).


def test_qkv_at_tp2_by_hand():
    name = L0 + "self_attention.linear_qkv.weight"
    assert slices(name, 2, 0) == [
        ("self_attn.q_proj.weight", 0, 0, 0, 6),
        ("self_attn.k_proj.weight", 0, 0, 6, 3),
        ("self_attn.v_proj.weight", 0, 0, 9, 3),
    ]
    assert slices(name, 2, 1) == [
        ("self_attn.q_proj.weight", 0, 6, 0, 6),
        ("self_attn.k_proj.weight", 0, 3, 6, 3),
        ("self_attn.v_proj.weight", 0, 3, 9, 3),
    ]


def test_qkv_at_tp1_interleaves_the_groups():
    assert slices(L0 + "self_attention.linear_qkv.bias", 1, 0) == [
        ("self_attn.q_proj.bias", 0, 0, 0, 6),
        ("self_attn.k_proj.bias", 0, 0, 6, 3),
        ("self_attn.v_proj.bias", 0, 0, 9, 3),
        ("self_attn.q_proj.bias", 0, 6, 12, 6),
        ("self_attn.k_proj.bias", 0, 3, 18, 3),
        ("self_attn.v_proj.bias", 0, 3, 21, 3),
    ]


def test_the_other_splits_at_tp2_by_hand():
    assert slices(L0 + "mlp.linear_fc1.weight", 2, 1) == [
        ("mlp.gate_proj.weight", 0, 5, 0, 5),
        ("mlp.up_proj.weight", 0, 5, 5, 5),
    ]
    assert slices(L0 + "mlp.linear_fc2.weight", 2, 1) == [("mlp.down_proj.weight", 1, 5, 0, 5)]
    assert slices(L0 + "self_attention.linear_proj.weight", 2, 1) == [("self_attn.o_proj.weight", 1, 6, 0, 6)]
    assert slices(L0 + "input_layernorm.weight", 2, 1) == [("input_layernorm.weight", 0, 0, 0, 6)]


def test_a_vocabulary_that_does_not_divide_leaves_its_padding_without_a_piece():
    name = "embedding.word_embeddings.weight"  # 7 rows
    assert [slices(name, 2, r)[0][2:] for r in (0, 1)] == [(0, 0, 4), (4, 0, 3)]
    small = replace(MODEL, vocab_size=5)  # 8 rows over 4 ranks: the last holds nothing but padding
    assert [slices(name, 4, r, small) for r in (2, 3)] == [[("model.embed_tokens.weight", 0, 4, 0, 1)], []]
    assert [padded_vocab(v, 4) for v in (7, 8, 9)] == [8, 8, 12]


def test_tied_output_layer_reads_the_embedding():
    assert pieces("output_layer.weight", replace(MODEL, tied=True), tp=1, tp_rank=0) == [
        Piece("model.embed_tokens.weight", 0, 0, 0, 7)
    ]


def test_unknown_name():
    with pytest.raises(ValueError, match="add a Row"):
        pieces("decoder.layers.0.mlp.experts.weight", MODEL, tp=1, tp_rank=0)


def megatron_names(model, transformer_engine: bool) -> list[str]:
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"] + ["output_layer.weight"] * (not model.tied)
    for i in range(model.num_layers):
        layer = [
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
        ]
        if model.num_experts:
            layer += ["mlp.router.weight"]
            one = "experts.linear_fc{k}.weight{e}" if transformer_engine else "experts.local_experts.{e}.linear_fc{k}.weight"
            layer += ["mlp." + one.format(e=e, k=k) for e in range(model.num_experts) for k in (1, 2)]
        else:
            layer += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        layer += [f"self_attention.{name}_layernorm.weight" for name in "qk" if model.qk_norm]
        layer += ["self_attention.linear_qkv.bias"] * model.qkv_bias
        if transformer_engine:
            mlp_norm = "pre_mlp_layernorm.weight" if model.num_experts else "mlp.linear_fc1.layer_norm_weight"
            layer += ["self_attention.linear_qkv.layer_norm_weight", mlp_norm]
        else:
            layer += ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
        names += [f"decoder.layers.{i}.{name}" for name in layer]
    return names


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize(
    ("tp", "changes"),
    [
        (1, {}),
        (2, {"tied": True}),
        (2, {"vocab_size": 8, "qkv_bias": False}),
        (4, {"num_heads": 12, "num_kv_heads": 4, "head_dim": 2, "ffn_size": 8, "vocab_size": 13}),
        (4, {"num_heads": 4, "num_kv_heads": 4, "ffn_size": 4, "vocab_size": 5}),
        (2, {"qk_norm": True, "qkv_bias": False, "num_experts": 3}),
    ],
)
def test_the_ranks_cover_every_element_once(tp, changes, transformer_engine):
    model = replace(MODEL, **changes)
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(model).items()}
    for rank in range(tp):
        for name in megatron_names(model, transformer_engine):
            replicated = name.endswith(("layernorm.weight", "layer_norm_weight", "router.weight"))
            end = 0
            for piece in pieces(name, model, tp=tp, tp_rank=rank):
                assert piece.start == end and piece.size > 0  # a shard is filled from its start without gaps
                end += piece.size
                if not replicated or rank == 0:
                    covered[piece.hf].narrow(piece.dim, piece.hf_start, piece.size).add_(1)
    assert all(bool((count == 1).all()) for count in covered.values()), [n for n, c in covered.items() if (c != 1).any()]
