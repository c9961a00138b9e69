"""Checkpoints that this package cannot train are refused by config.json, before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import read_model


@pytest.fixture
def folder(small_llama, tmp_path) -> Path:
    return Path(shutil.copytree(small_llama, tmp_path / "model"))


def configure(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in (config | changes).items() if v != "removed"})
    )
    return folder


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(UserError, match=".*".join(map(re.escape, (str(folder), *words)))):
        read_model(folder)


def test_what_is_read(folder):
    model = read_model(folder)
    assert (model.architecture, model.num_layers, model.hidden_size) == ("LlamaForCausalLM", 2, 32)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_size) == (4, 2, 8, 16)
    assert (model.tied, model.qkv_bias, model.rope_factor, model.rope_theta) == (False, False, None, 10000.0)
    assert model.eos_token_ids == (1,)
    configure(folder, num_key_value_heads=None, head_dim=16, tie_word_embeddings=True)
    model = read_model(folder)
    assert (model.num_kv_heads, model.head_dim, model.tied) == (4, 16, True)


def test_end_of_sequence_tokens_come_from_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert read_model(folder).eos_token_ids == (5, 9)
    (folder / "generation_config.json").unlink()
    assert read_model(folder).eos_token_ids == (1,)


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuse(folder, "no config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 9999, "is not JSON (maximum recursion"),
        ("[]", "holds a list, not an object"),
    ],
    ids=["cut short", "deep", "list"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_is_named(folder, name, text, words):
    (folder / name).write_text(text)
    refuse(folder, f": {name} {words}", "fetch the checkpoint again")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads", "rms_norm_eps"])
def test_a_size_that_config_json_lacks_is_named(folder, key):
    refuse(configure(folder, **{key: "removed"}), f"config.json has no '{key}', which LlamaForCausalLM needs")


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refuse(folder, "no tokenizer", "save_pretrained")


@pytest.mark.parametrize("architectures", [["MixtralForCausalLM"], [], None])
def test_an_unsupported_architecture_names_the_supported_ones(folder, architectures):
    refuse(
        configure(folder, architectures=architectures),
        "is not supported; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3",
    )


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}


def test_what_config_json_leaves_out_is_what_transformers_takes(folder):
    from transformers import Qwen3Config, Qwen3MoeConfig

    assert (
        read_model(configure(folder, **MOE)).renormalize_experts is Qwen3MoeConfig().norm_topk_prob is False
    )
    model = read_model(configure(folder, architectures=["Qwen3ForCausalLM"], head_dim="removed"))
    assert model.head_dim == Qwen3Config().head_dim == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported for LlamaForCausalLM, only "silu"'),
        ({"mlp_bias": True}, "mlp_bias=true is not supported for LlamaForCausalLM, only false"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window=true"),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}, "use_sliding_window=true"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias=true"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            "sliding_window=4096 is not supported for Mistral",
        ),
        (
            {"architectures": ["MistralForCausalLM"]},
            "sliding_window=4096",
        ),  # what transformers takes when the key is left out
        (
            MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "num_experts_per_tok=1 with norm_topk_prob=true",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types ['sliding_attention'] are not supported",
        ),
    ],
)
def test_options_that_would_train_another_model(folder, changes, words):
    refuse(configure(folder, **changes), words)


def test_null_is_what_transformers_takes_for_it(folder):
    read_model(configure(folder, attention_bias=None, layer_types=["full_attention"] * 2))
    read_model(configure(folder, **MOE, mlp_only_layers=None, norm_topk_prob=False))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        LLAMA3 | {"high_freq_factor": 8.0},
    ],
)
def test_other_rope_scalings(folder, key, rope):
    refuse(
        configure(folder, **{"rope_parameters": None, key: rope}),
        "rope scaling",
        "supported: none, and llama3",
    )


def test_rope_of_both_spellings(folder):
    old = read_model(configure(folder, rope_parameters="removed", rope_theta=5e5, rope_scaling=LLAMA3))
    new = read_model(
        configure(
            folder, rope_scaling="removed", rope_theta="removed", rope_parameters=LLAMA3 | {"rope_theta": 5e5}
        )
    )
    assert (old.rope_theta, old.rope_factor) == (new.rope_theta, new.rope_factor) == (5e5, 32.0)
