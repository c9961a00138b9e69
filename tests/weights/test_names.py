"""Every Megatron parameter has its Hugging Face tensors, by a table that refuses what it does not know."""

from __future__ import annotations

import pytest
from support.models import make_tiny_model
from support.weights import small_model

from megatron_dapo.model_spec import read_model
from megatron_dapo.weights.names import ROWS, hf_shapes, row_of

MODEL = small_model()


@pytest.mark.parametrize(
    ("megatron", "hf", "split"),
    [
        ("embedding.word_embeddings.weight", ["model.embed_tokens.weight"], "vocab"),
        ("output_layer.weight", ["lm_head.weight"], "vocab"),
        ("decoder.final_layernorm.weight", ["model.norm.weight"], "replicated"),
        (
            "decoder.layers.11.self_attention.linear_qkv.bias",
            [f"model.layers.11.self_attn.{p}_proj.bias" for p in "qkv"],
            "qkv",
        ),
        (
            "decoder.layers.0.self_attention.linear_proj.weight",
            ["model.layers.0.self_attn.o_proj.weight"],
            "row",
        ),
        ("decoder.layers.3.mlp.linear_fc2.weight", ["model.layers.3.mlp.down_proj.weight"], "row"),
        (
            "decoder.layers.3.mlp.linear_fc1.weight",
            ["model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"],
            "gate_up",
        ),
        (
            "decoder.layers.2.pre_mlp_layernorm.weight",
            ["model.layers.2.post_attention_layernorm.weight"],
            "replicated",
        ),
        (
            "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
            ["model.layers.2.post_attention_layernorm.weight"],
            "replicated",
        ),
        (
            "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
            ["model.layers.2.input_layernorm.weight"],
            "replicated",
        ),
    ],
)
def test_rows(megatron, hf, split):
    row = row_of(megatron)
    assert (row.megatron, list(row.hf), row.split) == ((megatron,), hf, split)


def test_a_tied_output_layer_is_the_embedding():
    assert list(row_of("output_layer.weight", tied=True).hf) == ["model.embed_tokens.weight"]
    assert list(row_of("decoder.final_layernorm.weight", tied=True).hf) == ["model.norm.weight"]


@pytest.mark.parametrize(
    "name",
    ["decoder.layers.0.mlp.router.expert_bias", "decoder.layers.x.input_layernorm.weight", "lm_head.weight"],
)
def test_an_unknown_name_says_which_row_to_add(name):
    with pytest.raises(ValueError, match=rf"{name}.*add a Row to ROWS in megatron_dapo/weights/names.py"):
        row_of(name)


def test_nothing_is_written_twice():
    for names in ([name for row in ROWS for name in row.megatron], [name for row in ROWS for name in row.hf]):
        assert len(set(names)) == len(names)


def test_shapes_by_hand():
    shapes = hf_shapes(MODEL)
    assert list(shapes)[0] == "model.embed_tokens.weight" and list(shapes)[-1] == "lm_head.weight"
    assert len(shapes) == 3 + 2 * 12
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (12, 6)
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (6,)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (6, 12)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (6, 10)
    assert "lm_head.weight" not in hf_shapes(small_model(tied=True))
    assert not any("bias" in name for name in hf_shapes(small_model(qkv_bias=False)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["qwen2", "llama", "mistral", "qwen3", "qwen3_moe"])
def test_shapes_are_those_of_transformers(tmp_path, arch, tied):
    from safetensors.torch import load_file

    folder = make_tiny_model(
        tmp_path / "model", arch=arch, tied=tied, layers=3, hidden=48, heads=6, kv_heads=2, ffn=40
    )
    written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_shapes(read_model(folder)) == written
