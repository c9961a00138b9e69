"""Where each shard lies in the checkpoint: by hand for a small model; for others, each element once."""

from __future__ import annotations

import pytest
import torch
from support.weights import megatron_names, small_model

from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Slice, padded_vocab, slices_of

L0, H0 = "decoder.layers.0.", "model.layers.0."
MODEL = small_model()


def rows(name: str, tp: int, tp_rank: int, model=MODEL) -> list[tuple[str, int, int, int, int]]:
    slices = slices_of(name, model, tp=tp, tp_rank=tp_rank)
    return [(s.hf.removeprefix(H0), s.dim, s.hf_start, s.start, s.size) for s in slices]


# The model has 4 query heads and 2 key/value heads of 3 dimensions: each of two ranks holds one group (2
# queries, 1 key, 1 value).


def test_qkv_at_tp2_by_hand():
    name = L0 + "self_attention.linear_qkv.weight"
    assert rows(name, 2, 0) == [
        ("self_attn.q_proj.weight", 0, 0, 0, 6),
        ("self_attn.k_proj.weight", 0, 0, 6, 3),
        ("self_attn.v_proj.weight", 0, 0, 9, 3),
    ]
    assert rows(name, 2, 1) == [
        ("self_attn.q_proj.weight", 0, 6, 0, 6),
        ("self_attn.k_proj.weight", 0, 3, 6, 3),
        ("self_attn.v_proj.weight", 0, 3, 9, 3),
    ]


def test_qkv_at_tp1_interleaves_the_groups():
    assert rows(L0 + "self_attention.linear_qkv.bias", 1, 0) == [
        ("self_attn.q_proj.bias", 0, 0, 0, 6),
        ("self_attn.k_proj.bias", 0, 0, 6, 3),
        ("self_attn.v_proj.bias", 0, 0, 9, 3),
        ("self_attn.q_proj.bias", 0, 6, 12, 6),
        ("self_attn.k_proj.bias", 0, 3, 18, 3),
        ("self_attn.v_proj.bias", 0, 3, 21, 3),
    ]


def test_the_other_splits_at_tp2_by_hand():
    assert rows(L0 + "mlp.linear_fc1.weight", 2, 1) == [
        ("mlp.gate_proj.weight", 0, 5, 0, 5),
        ("mlp.up_proj.weight", 0, 5, 5, 5),
    ]
    assert rows(L0 + "mlp.linear_fc2.weight", 2, 1) == [("mlp.down_proj.weight", 1, 5, 0, 5)]
    assert rows(L0 + "self_attention.linear_proj.weight", 2, 1) == [("self_attn.o_proj.weight", 1, 6, 0, 6)]
    assert rows(L0 + "input_layernorm.weight", 2, 1) == [("input_layernorm.weight", 0, 0, 0, 6)]


def test_the_padding_of_a_vocabulary_has_no_slice():
    name = "embedding.word_embeddings.weight"  # 7 rows
    assert [rows(name, 2, r)[0][2:] for r in (0, 1)] == [(0, 0, 4), (4, 0, 3)]
    small = small_model(vocab_size=5)  # 8 rows over 4 ranks: the last holds nothing but padding
    assert [rows(name, 4, r, small) for r in (2, 3)] == [[("model.embed_tokens.weight", 0, 4, 0, 1)], []]
    assert [padded_vocab(v, 4) for v in (7, 8, 9)] == [8, 8, 12]


def test_tied_output_layer_reads_the_embedding():
    assert slices_of("output_layer.weight", small_model(tied=True), tp=1, tp_rank=0) == [
        Slice("model.embed_tokens.weight", 0, 0, 0, 7)
    ]


def test_unknown_name():
    with pytest.raises(ValueError, match="add a Row"):
        slices_of("decoder.layers.0.mlp.experts.weight", MODEL, tp=1, tp_rank=0)


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
    model = small_model(**changes)
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(model).items()}
    for rank in range(tp):
        for name in megatron_names(model, transformer_engine=transformer_engine):
            replicated = name.endswith(("layernorm.weight", "layer_norm_weight", "router.weight"))
            end = 0
            for part in slices_of(name, model, tp=tp, tp_rank=rank):
                assert part.start == end and part.size > 0  # a shard is filled from its start without gaps
                end += part.size
                if not replicated or rank == 0:
                    covered[part.hf].narrow(part.dim, part.hf_start, part.size).add_(1)
    assert [name for name, count in covered.items() if (count != 1).any()] == []
