"""Bad checkpoints are refused before anything is loaded, with the reason; good ones are read slice by slice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from megatron_dapo.bridge import hf


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("hf") / "model", arch="llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=16
    )


@pytest.fixture
def folder(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def configure(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "removed"}))
    return folder


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, (str(folder), *words)))):
        hf.read_model(folder)


def test_what_is_read(folder):
    model = hf.read_model(folder)
    assert (model.architecture, model.num_layers, model.hidden_size) == ("LlamaForCausalLM", 2, 32)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_size) == (4, 2, 8, 16)
    assert (model.tied, model.qkv_bias, model.rope_factor, model.rope_theta) == (False, False, None, 10000.0)
    assert model.eos_token_ids == (1,)
    configure(folder, num_key_value_heads=None, head_dim=16, tie_word_embeddings=True)
    model = hf.read_model(folder)
    assert (model.num_kv_heads, model.head_dim, model.tied) == (4, 16, True)


def test_end_of_sequence_tokens_come_from_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert hf.read_model(folder).eos_token_ids == (5, 9)
    (folder / "generation_config.json").unlink()
    assert hf.read_model(folder).eos_token_ids == (1,)


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuse(folder, "no config.json")


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

    assert hf.read_model(configure(folder, **MOE)).renormalize_experts is Qwen3MoeConfig().norm_topk_prob is False
    model = hf.read_model(configure(folder, architectures=["Qwen3ForCausalLM"], head_dim="removed"))
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
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window=4096 is not supported for Mistral"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window=4096"),  # what transformers takes when the key is left out
        (MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types ['sliding_attention'] are not supported"),
    ],
)
def test_options_that_would_train_another_model(folder, changes, words):
    refuse(configure(folder, **changes), words)


def test_null_is_what_transformers_takes_for_it(folder):
    hf.read_model(configure(folder, attention_bias=None, layer_types=["full_attention"] * 2))
    hf.read_model(configure(folder, **MOE, mlp_only_layers=None, norm_topk_prob=False))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, LLAMA3 | {"high_freq_factor": 8.0}]
)
def test_other_rope_scalings(folder, key, rope):
    refuse(configure(folder, **{"rope_parameters": None, key: rope}), "rope scaling", "supported: none, and llama3")


def test_rope_of_both_spellings(folder):
    old = hf.read_model(configure(folder, rope_parameters="removed", rope_theta=5e5, rope_scaling=LLAMA3))
    new = hf.read_model(
        configure(folder, rope_scaling="removed", rope_theta="removed", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    )
    assert (old.rope_theta, old.rope_factor) == (new.rope_theta, new.rope_factor) == (5e5, 32.0)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "not-a-name", "a/b/c"])
def test_neither_folder_nor_hub_name(name):
    with pytest.raises(ValueError, match="neither a folder nor a hub name"):
        hf.resolve_folder(name)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"model.path='owner/name'.*no route to host; give a local folder"):
        hf.resolve_folder("owner/name")


def test_slices_of_one_file_and_of_several(folder):
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    reader = hf.CheckpointReader(folder)
    assert torch.equal(reader.read(name, 0, 3, 5), whole[name][3:8])
    assert torch.equal(reader.read(name, 1, 30, 2), whole[name][:, 30:32])
    files = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(whole)}
    for file in sorted(set(files.values())):
        save_file({key: tensor for key, tensor in whole.items() if files[key] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    reader = hf.CheckpointReader(folder)
    assert all(torch.equal(reader.read(key, 0, 0, len(tensor)), tensor) for key, tensor in whole.items())


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.7\.mlp\.up_proj\.weight'"):
        hf.CheckpointReader(folder).read("model.layers.7.mlp.up_proj.weight", 0, 0, 1)


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors; convert"):
        hf.CheckpointReader(folder)


def test_a_finished_checkpoint_has_the_side_files_but_no_other_index(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    out.mkdir()
    tensor = torch.arange(6.0).view(2, 3).bfloat16()
    file = hf.write_shard(out, 1, {"a": tensor.t()})
    hf.finish_checkpoint(out, folder, {"a": file}, 12, "bf16")
    assert torch.equal(load_file(out / file)["a"], tensor.t())
    assert json.loads((out / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": file},
    }
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "chat_template.jinja").is_file() and (out / "tokenizer.json").is_file()
    assert not (out / "model.safetensors").exists()


def test_replacing_a_folder_leaves_the_new_one_alone(tmp_path):
    for name, text in (("final", "old"), ("final.tmp", "new"), ("final.old", "left over")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    hf.replace_folder(tmp_path / "final.tmp", tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "file").read_text() == "new"
