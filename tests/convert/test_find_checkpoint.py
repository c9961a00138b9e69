"""Which folder of a run, a step or a peer's checkpoint holds the weights, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from test_torch_dist_folder import like_megatron, write

from megatron_dapo.convert.checkpoint import find, open_checkpoint
from megatron_dapo.errors import UserError


def megatron(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def hf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    return folder


def test_a_run_of_this_project_leads_to_its_newest_step(tmp_path):
    for step in (9, 10):
        megatron(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}" / "run.pt").touch()
    for left in ("step_000011.tmp", "step_000012"):  # of a save that was killed
        (tmp_path / "run" / "checkpoints" / left).mkdir()
    newest = tmp_path / "run" / "checkpoints" / "step_000010"
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest):
        assert find(path) == ("torch_dist", newest)


@pytest.mark.parametrize(("word", "name"), [("40", "iter_0000040"), ("release", "release")])
def test_megatron_lm_and_slime_follow_the_tracker(tmp_path, word, name):
    for iteration in ("iter_0000040", "iter_0000060", "release"):
        megatron(tmp_path / iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(word + "\n")
    assert find(tmp_path) == ("torch_dist", tmp_path / name)


def test_a_tracker_without_its_folder(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(UserError, match=r"txt says 40, but there is no iter_0000040"):
        find(tmp_path)


@pytest.mark.parametrize("inner", ["model/dist_ckpt", "dist_ckpt"])
def test_verl(tmp_path, inner):
    weights = megatron(tmp_path / "global_step_20" / "actor" / inner)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for path in (tmp_path, tmp_path / "global_step_20", tmp_path / "global_step_20" / "actor"):
        assert find(path) == ("torch_dist", weights)


def test_verls_manifest_says_where_the_model_is(tmp_path):
    weights = hf(tmp_path / "actor" / "model" / "huggingface")
    megatron(tmp_path / "actor" / "optimizer" / "dist_ckpt")
    contents = {"contents": {"model": {"path": "model/huggingface", "format": "huggingface"}}}
    (tmp_path / "actor" / "ckpt_contents.json").write_text(json.dumps(contents))
    assert find(tmp_path) == ("hf", weights)


def test_nemo_rl(tmp_path):
    weights = megatron(tmp_path / "step_7" / "policy" / "weights" / "iter_0000000")
    assert find(tmp_path) == find(tmp_path / "step_7") == ("torch_dist", weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("policy/weights/model/.metadata", "not of Megatron .*convert_dcp_to_hf"),
        ("actor/model_world_size_8_rank_0.pt", "FSDP shards of verl.*verl.model_merger"),
        ("adapter_config.json", "holds an adapter"),
        ("pytorch_model-00001-of-00002.bin", r"has \.bin files; convert them"),
        ("nothing.txt", "holds no checkpoint that is known"),
    ],
)
def test_what_is_known_and_not_read_is_refused_with_the_reason(tmp_path, make, message):
    (tmp_path / make).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / make).touch()
    with pytest.raises(UserError, match=message):
        find(tmp_path)


def test_saves_that_were_cut_off_and_other_backends(tmp_path):
    folder = megatron(tmp_path / "iter_0000001")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match="sharded_backend zarr is not read"):
        find(folder)
    (folder / ".metadata").unlink()
    (folder / "__0_0.distcp").touch()
    with pytest.raises(UserError, match=r"has no \.metadata: its save was cut off"):
        find(folder)
    with pytest.raises(UserError, match="/no/such is no folder"):
        find(Path("/no/such"))


def test_step_and_layout_of_megatrons_training(tmp_path):
    folder = write(tmp_path / "iter_0000003", like_megatron())
    assert open_checkpoint(folder).step == 3 and open_checkpoint(folder).layout == {"tp": 1}
    args = argparse.Namespace(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, other="x")
    torch.save({"args": args, "iteration": 30}, folder / "common.pt")
    found = open_checkpoint(tmp_path)
    assert found.step == 30 and found.layout == {"tp": 4, "pp": 2} and found.hf_folder is None


def test_step_layout_and_model_of_this_projects_run(tmp_path, small_llama):
    folder = write(tmp_path / "checkpoints" / "step_000003", like_megatron())
    torch.save({"format": 2, "step": 3}, folder / "run.pt")
    layout = "layout: {tensor_parallel: 2, pipeline_parallel: 1, virtual_pipeline_parallel: null}"
    (tmp_path / "config.yaml").write_text(f"model: {{path: {small_llama}}}\n{layout}\n")
    found = open_checkpoint(tmp_path)
    assert found.step == 3 and found.layout == {"tp": 2, "pp": 1} and found.hf_folder == small_llama
