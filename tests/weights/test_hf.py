"""Checkpoint folders: resolved, read slice by slice, and written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dapo.errors import UserError
from megatron_dapo.weights import hf


@pytest.fixture
def folder(small_llama, tmp_path) -> Path:
    return Path(shutil.copytree(small_llama, tmp_path / "model"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "not-a-name", "a/b/c"])
def test_neither_folder_nor_hub_name(name):
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        hf.resolve_folder(name)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"model.path='owner/name'.*no route to host; give a local folder"):
        hf.resolve_folder("owner/name")


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("Qwen2.5-32B", "Qwen/Qwen2.5-32B"),
        ("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
        ("someone/Qwen2.5-32B", "someone/Qwen2.5-32B"),
    ],
)
def test_a_name_of_a_family_is_looked_for_under_its_owners(monkeypatch, tmp_path, model, asked):
    """Unless a folder has that name."""
    import huggingface_hub

    def snapshot(name, **_):
        return f"/hub/{name}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert hf.resolve_folder(model) == Path("/hub") / asked
    Path(model).mkdir(parents=True)
    assert hf.resolve_folder(model) == Path(model)


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
    with pytest.raises(UserError, match=r"has no tensor 'model\.layers\.7\.mlp\.up_proj\.weight'"):
        hf.CheckpointReader(folder).read("model.layers.7.mlp.up_proj.weight", 0, 0, 1)


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model\.safetensors; convert"):
        hf.CheckpointReader(folder)


def test_a_file_that_cannot_be_read_is_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        hf.CheckpointReader(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    with pytest.raises(UserError, match=r"part-1\.safetensors cannot be read"):
        hf.CheckpointReader(folder).read("a", 0, 0, 1)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be read: JSONDecodeError"):
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
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (
        tmp_path / "final" / "file"
    ).read_text() == "new"
