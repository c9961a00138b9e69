"""Exports of made-up weights: every bit arrives, rank 0 never holds much, and a failure is everybody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_tiny_model
from support.ranks import run_ranks
from support.weights import make_weights, small_model

EXPERTS = {"tied": True, "num_experts": 3, "qk_norm": True, "qkv_bias": False}
CASES: dict[str, dict[str, Any]] = {
    "tp2_pp2": dict(changes={}, dtype="fp32", tp=2, pp=2, chunk_bytes=1),
    "tp2_pp1_bf16": dict(changes={"vocab_size": 8}, dtype="bf16", tp=2, pp=1, chunk_bytes=500),
    "tp1_pp2_experts": dict(changes=EXPERTS, dtype="fp32", tp=1, pp=2, chunk_bytes=1 << 20),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("source") / "model", layers=1, hidden=32, heads=4, ffn=16)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory) -> Path:
    """A folder per case, over what an export that was cut off has left behind."""
    folder = tmp_path_factory.mktemp("exports")
    left_over = folder / "tp2_pp2.tmp"
    left_over.mkdir()
    (left_over / "model-00099.safetensors").touch()
    cases = [case | {"folder": str(folder / name)} for name, case in CASES.items()]
    run_ranks("support.sync_jobs:write_checkpoints", 4, cases=cases, source=str(source))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_bit_arrives(exported, source, name):
    case, folder = CASES[name], exported / name
    weights = make_weights(small_model(**case["changes"]), case["dtype"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}.safetensors" for i in range(len(files))]
    held = {file: load_file(folder / file) for file in files}
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    tensors = {name: tensor for file in files for name, tensor in held[file].items()}
    assert tensors.keys() == weights.keys()
    for key, tensor in weights.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor), key
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert len(files) == {1: len(weights), 1 << 20: 1}.get(case["chunk_bytes"], len(files))
    assert case["chunk_bytes"] != 500 or 1 < len(files) < len(weights)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[case["dtype"]]
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not folder.with_name(folder.name + ".tmp").exists()


def test_what_fails_on_rank_0_fails_on_every_rank_and_can_be_repeated(source, tmp_path):
    first, second = run_ranks(
        "support.sync_jobs:fail_to_export", 2, folder=str(tmp_path), source=str(source), timeout_s=120
    )
    begin = f"UserError UserError: rank 0 could not export the weights to {tmp_path / 'hf'}: "
    assert first["no folder"] == second["no folder"]
    assert first["no folder"].startswith("UserError ") and "Not a directory" in first["no folder"]
    assert first["disk full"] == second["disk full"] == begin + "OSError: [Errno 28] No space left on device"
    assert first["mistake"] == "KeyError: 'mistake'"  # ours: rank 0 keeps its traceback
    assert second["mistake"] == begin + "KeyError: 'mistake'"
    # the last shard of rank 1 is the second half of the last layer's query, key and value biases
    mistake = "AssertionError: the ranks hold 6 of the 12 elements of model.layers.1.self_attn.q_proj.bias"
    assert first["a shard missing"].splitlines()[0] == mistake
    assert second["a shard missing"].splitlines()[0] == begin + mistake
    assert first["before"] == "['hf.tmp']"  # no half export under the final name
    assert first["at last"] == second["at last"] == "done"
    weights = make_weights(small_model())
    files = [load_file(path) for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert sum(len(tensors) for tensors in files) == len(weights)


def test_rank_0_holds_two_chunks_at_most(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process at once
    chunk_bytes = 12 << 20
    first, second = run_ranks(
        "support.sync_jobs:peak_of_export",
        2,
        folder=str(tmp_path / "hf"),
        source=str(source),
        chunk_bytes=chunk_bytes,
    )
    assert first["total"] > 6 * chunk_bytes
    assert 1.5 * chunk_bytes < first["grown"] < 2 * chunk_bytes
    assert second["grown"] < chunk_bytes
