"""HF -> Megatron shards -> HF gives back every bit, whatever the layout and the size of the buckets."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.parity_runs import BUCKETS, CASES

RUNS = [(*case, size) for case in CASES for size in (BUCKETS[-1:] if case[1] == "tp1" else BUCKETS)]


@pytest.mark.parametrize(("name", "layout", "bucket_bytes"), RUNS)
def test_export_is_bit_equal_to_the_source(measured, name, layout, bucket_bytes):
    source = load_file(measured.models[name] / "model.safetensors")
    folder = measured.folder / f"{name}@{layout}-{bucket_bytes}"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    exported = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert all(index["weight_map"][key] == file for key in held)
        exported |= held
    assert exported.keys() == index["weight_map"].keys() == source.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in source.values())
    for key, tensor in source.items():
        assert exported[key].dtype == tensor.dtype and exported[key].shape == tensor.shape
        assert torch.equal(exported[key].view(torch.int32), tensor.view(torch.int32)), key
    num_files = len(set(index["weight_map"].values()))
    assert num_files == {BUCKETS[0]: len(source), BUCKETS[-1]: 1}.get(bucket_bytes, num_files)
    assert bucket_bytes != BUCKETS[1] or 1 < num_files < len(source)


def test_transformers_loads_an_export_with_its_tokenizer(measured):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = measured.folder / f"llama-untied@tp2_pp2-{BUCKETS[1]}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    source = load_file(measured.models["llama-untied"] / "model.safetensors")
    assert all(torch.equal(p, source[name]) for name, p in model.named_parameters())
    original = AutoTokenizer.from_pretrained(measured.models["llama-untied"])
    assert AutoTokenizer.from_pretrained(folder).encode("1 + 2 = 3") == original.encode("1 + 2 = 3")
