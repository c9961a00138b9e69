"""What does not fit config.json is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.weights import small_model

from megatron_dapo.convert.mapping import as_hf, as_megatron, by_parameter, check_hf, read_spec
from megatron_dapo.convert.tensors import Block, Stored
from megatron_dapo.errors import UserError
from megatron_dapo.weights.names import hf_shapes

MODEL, WHERE = small_model(), Path("/somewhere")


def stored(shape: tuple[int, ...]) -> Stored:
    """A tensor that is nowhere: shapes are all that is looked at."""
    return Stored(shape, torch.float32, (Block(WHERE, 0, shape[0], math.prod(shape[1:])),))


def hf_tensors(model=MODEL) -> dict[str, Stored]:
    return {name: stored(shape) for name, shape in hf_shapes(model).items()}


def megatron_tensors(model=MODEL) -> dict[str, Stored]:
    return {t.name: stored(s.shape) for t, s in as_megatron(hf_tensors(model), model, WHERE).items()}


def test_shapes_of_megatrons_parameters_by_hand():
    shapes = {name: tensor.shape for name, tensor in megatron_tensors().items()}
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (7, 6)
    layer = {name.split(".", 3)[3]: s for name, s in shapes.items() if name.startswith("decoder.layers.1.")}
    assert layer == {
        "self_attention.linear_qkv.layer_norm_weight": (6,),
        "self_attention.linear_qkv.weight": (24, 6),
        "self_attention.linear_qkv.bias": (24,),
        "self_attention.linear_proj.weight": (6, 12),
        "mlp.linear_fc1.layer_norm_weight": (6,),
        "mlp.linear_fc1.weight": (20, 6),
        "mlp.linear_fc2.weight": (6, 10),
    }


def test_an_unknown_architecture_names_the_files_to_edit(small_llama, tmp_path):
    folder = Path(shutil.copytree(small_llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(UserError) as caught:
        read_spec(folder)
    for part in ("GemmaForCausalLM", "model_spec.py", "weights/names.py", "policy/model.py"):
        assert part in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_spec(folder)


def test_a_missing_tensor():
    tensors = hf_tensors()
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.self_attn\.k_proj\.bias.*index lacks"):
        check_hf(tensors, MODEL, WHERE)


def test_tensors_that_the_architecture_does_not_have():
    tied = replace(MODEL, tied=True)
    extra = hf_tensors(tied) | {"lm_head.weight": stored((7, 6)), "x.rotary_emb.inv_freq": stored((3,))}
    assert check_hf(extra, tied, WHERE).keys() == hf_shapes(tied).keys()
    with pytest.raises(UserError, match=r"has no tensor model\.vision\.weight; to add a model edit"):
        check_hf(extra | {"model.vision.weight": stored((3,))}, tied, WHERE)


def test_another_size_on_either_side():
    larger = replace(MODEL, ffn_size=12)
    with pytest.raises(UserError, match=r"gate_proj\.weight is \[12, 6\], config\.json says \[10, 6\]"):
        check_hf(hf_tensors(larger), MODEL, WHERE)
    with pytest.raises(UserError, match=r"linear_fc1\.weight is \[24, 6\], config\.json says \[20, 6\]"):
        as_hf(megatron_tensors(larger), MODEL, WHERE)


def test_another_kind_of_model():
    with pytest.raises(UserError, match=r"linear_qkv\.bias, config\.json's model has no .*q_proj\.bias"):
        as_hf(megatron_tensors(), replace(MODEL, qkv_bias=False), WHERE)
    with pytest.raises(
        UserError, match=r"no parameter for the tensor model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        as_hf(megatron_tensors(replace(MODEL, qkv_bias=False)), MODEL, WHERE)


def test_a_shorter_vocabulary_is_refused_and_padding_is_not():
    tensors = megatron_tensors()
    with pytest.raises(UserError, match=r"word_embeddings\.weight is \[6, 6\], config\.json says \[7, 6\]"):
        as_hf(tensors | {"embedding.word_embeddings.weight": stored((6, 6))}, MODEL, WHERE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
            "no model here has the parameter.*names.py",
        ),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "holds adapters"),
    ],
)
def test_parameters_that_are_not_known(name, message):
    for made in (lambda t: as_hf(t, MODEL, WHERE), lambda t: by_parameter(t, WHERE)):
        with pytest.raises(UserError, match=message):
            made(megatron_tensors() | {name: stored((6, 6))})
