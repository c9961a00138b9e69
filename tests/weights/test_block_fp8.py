"""What a checkpoint in block FP8 consists of, by hand, and that vLLM reads its configuration so."""

from __future__ import annotations

import torch
from support.weights import small_model

from megatron_dapo.weights.block_fp8 import (
    checkpoint_facts,
    linear_weights,
    quantization_config,
    scale_shapes,
)
from megatron_dapo.weights.names import hf_shapes

SHAPES = {
    "model.embed_tokens.weight": (320, 512),
    "model.layers.0.self_attn.q_proj.weight": (512, 512),
    "model.layers.0.self_attn.q_proj.bias": (512,),
    "model.layers.0.mlp.gate.weight": (8, 512),
    "model.layers.0.mlp.experts.7.down_proj.weight": (512, 200),
    "model.norm.weight": (512,),
    "lm_head.weight": (320, 512),
}
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.7.down_proj.weight"


def test_by_hand():
    linear = linear_weights(SHAPES)
    assert linear == {Q: (512, 512), DOWN: (512, 200)}
    scales = scale_shapes(linear)
    assert scales == {Q + "_scale_inv": (4, 4), DOWN + "_scale_inv": (4, 2)}
    facts = checkpoint_facts({**SHAPES, **scales}, torch.bfloat16)
    assert facts[Q] == ((512, 512), torch.float8_e4m3fn)
    assert facts[DOWN + "_scale_inv"] == ((4, 2), torch.float32)
    others = facts.keys() - linear.keys() - scales.keys()
    assert {facts[name] for name in others} == {(SHAPES[name], torch.bfloat16) for name in others}
    assert quantization_config(SHAPES) == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"],
    }


def test_a_checkpoint_that_is_not_quantised_has_one_type():
    shapes = hf_shapes(small_model())
    assert checkpoint_facts(shapes, torch.float32) == {n: (s, torch.float32) for n, s in shapes.items()}
    assert scale_shapes({}) == {}


def test_every_matrix_of_every_family_is_quantised_or_named():
    for model in (
        small_model(),
        small_model(qkv_bias=False, qk_norm=True, num_experts=4),
        small_model(tied=True),
    ):
        shapes = hf_shapes(model)
        kept = {f"{name}.weight" for name in quantization_config(shapes)["modules_to_not_convert"]}
        assert {name for name, shape in shapes.items() if len(shape) == 2} == kept | set(
            linear_weights(shapes)
        )
        assert not kept & set(linear_weights(shapes))
