"""Distributed checkpoints that torch's own writer made, with the keys of Megatron's training; and what may be
wrong with one.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.weights import make_weights, small_model

from megatron_dapo.convert import torch_dist
from megatron_dapo.convert.mapping import as_hf
from megatron_dapo.convert.tensors import Reader
from megatron_dapo.errors import UserError

MODEL = small_model(num_experts=3, qk_norm=True, qkv_bias=False, tied=True)
WEIGHTS = make_weights(MODEL)
H = "model.layers.{}."


def qkv(i: int) -> torch.Tensor:
    """4 query heads, 2 key/value heads of 3 dimensions: two groups of two queries, a key and a value."""
    q, k, v = (WEIGHTS[H.format(i) + f"self_attn.{p}_proj.weight"].view(2, -1, 6) for p in "qkv")
    return torch.cat([torch.cat([q[g], k[g], v[g]]) for g in range(2)])


def stack(name: str) -> torch.Tensor:
    return torch.stack([WEIGHTS[H.format(i) + name] for i in range(2)])


def expert(i: int, e: int, part: str) -> torch.Tensor:
    return WEIGHTS[H.format(i) + f"mlp.experts.{e}.{part}_proj.weight"]


def fc1(i: int, e: int) -> torch.Tensor:
    return torch.cat([expert(i, e, "gate"), expert(i, e, "up")])


def like_megatron() -> dict[str, torch.Tensor]:
    """Layers stacked, experts stacked, vocabulary padded from 7 to 12 rows, TransformerEngine's names."""
    layers, experts = "decoder.layers.", "decoder.layers.mlp.experts.experts."
    return {
        "embedding.word_embeddings.weight": torch.cat(
            [WEIGHTS["model.embed_tokens.weight"], torch.ones(5, 6)]
        ),
        "decoder.final_layernorm.weight": WEIGHTS["model.norm.weight"],
        layers + "self_attention.linear_qkv.layer_norm_weight": stack("input_layernorm.weight"),
        layers + "self_attention.linear_qkv.weight": torch.stack([qkv(0), qkv(1)]),
        layers + "self_attention.linear_proj.weight": stack("self_attn.o_proj.weight"),
        layers + "self_attention.q_layernorm.weight": stack("self_attn.q_norm.weight"),
        layers + "self_attention.k_layernorm.weight": stack("self_attn.k_norm.weight"),
        layers + "pre_mlp_layernorm.weight": stack("post_attention_layernorm.weight"),
        layers + "mlp.router.weight": stack("mlp.gate.weight"),
        experts + "linear_fc1.weight": torch.stack(
            [torch.stack([fc1(i, e) for e in range(3)]) for i in range(2)]
        ),
        experts + "linear_fc2.weight": torch.stack(
            [torch.stack([expert(i, e, "down") for e in range(3)]) for i in range(2)]
        ),
        "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(6),
        "rng_state": torch.ones(3, 3, 3, dtype=torch.uint8),
    }


def layers_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A key for each layer, as where layers differ."""
    apart = {}
    for key, tensor in tensors.items():
        if key.startswith("decoder.layers."):
            for i in range(2):
                apart[key.replace("layers.", f"layers.{i}.")] = tensor[i].contiguous()
        else:
            apart[key] = tensor
    return apart


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with warnings.catch_warnings(action="ignore"):  # no process group is meant
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    return folder


def change(folder: Path, edit) -> None:
    """Edit .metadata in place."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("arrange", [lambda tensors: tensors, layers_apart])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_megatrons_keys_give_the_hugging_face_tensors(tmp_path, arrange, prefix):
    tensors = {prefix + key: tensor for key, tensor in arrange(like_megatron()).items()}
    if prefix:
        tensors.pop("module.rng_state")
    folder, reader = write(tmp_path, tensors), Reader()
    found = as_hf(torch_dist.read_folder(folder), MODEL, folder)
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(reader.read(name, found[name], 0, len(tensor)), tensor), name


def test_a_checkpoint_of_the_optimizer_alone(tmp_path):
    write(tmp_path, {"optimizer.state.exp_avg.output_layer.weight": torch.ones(3)})
    with pytest.raises(UserError, match="holds no parameter of a model"):
        torch_dist.read_folder(tmp_path)


def test_a_file_that_is_cut_short_or_gone_names_a_tensor(tmp_path):
    [file] = write(tmp_path, like_megatron()).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(UserError, match=rf"{file} is cut short: tensor \S+ ends at byte \d+, the file has"):
        torch_dist.read_folder(tmp_path)
    file.unlink()
    with pytest.raises(
        UserError, match=rf"{file} cannot be read \(No such file.*\); it holds a part of \S+weight"
    ):
        torch_dist.read_folder(tmp_path)


def test_a_changed_value_names_the_tensor(tmp_path):
    [file] = write(tmp_path, like_megatron()).glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(WEIGHTS["model.norm.weight"].numpy().tobytes()) + 2] ^= 4
    file.write_bytes(data)
    tensors = torch_dist.read_folder(tmp_path)
    with pytest.raises(UserError, match=rf"{file} is damaged: the checksum of tensor model\.norm\.weight"):
        Reader().read("model.norm.weight", tensors["decoder.final_layernorm.weight"], 0, 6)


def test_layout_metadata_that_is_not_that_of_the_files(tmp_path):
    key = "decoder.layers.self_attention.linear_proj.weight"

    def larger(metadata):
        metadata.state_dict_metadata[key].size = torch.Size((2, 6, 13))

    change(write(tmp_path, like_megatron()), larger)
    with pytest.raises(UserError, match=rf"parts of {key} at \[0\] .* do not make its shape \[6, 13\]"):
        torch_dist.read_folder(tmp_path)


def test_a_part_without_a_place(tmp_path):
    def forget(metadata):
        metadata.storage_data = {
            index: info for index, info in metadata.storage_data.items() if "final_layernorm" not in index.fqn
        }

    change(write(tmp_path, like_megatron()), forget)
    with pytest.raises(
        UserError, match=r"no place for the part of decoder\.final_layernorm\.weight at \[0\]"
    ):
        torch_dist.read_folder(tmp_path)


def test_half_of_a_gated_layer(tmp_path):
    write(tmp_path, {"decoder.layers.0.mlp.linear_fc1.weight_w": torch.ones(2, 2)})
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.mlp\.linear_fc1\.weight has one half"):
        torch_dist.read_folder(tmp_path)
