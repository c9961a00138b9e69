"""Our conversion against megatron-bridge's, name by name and bit by bit, where that is installed (the GPU
image). Neither the job nor its answers have been seen outside of one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support.convert_runs import weights
from support.models import make_tiny_model
from support.ranks import run_ranks

from megatron_dapo.convert.mapping import as_megatron, read_spec
from megatron_dapo.convert.safetensors_files import read_folder
from megatron_dapo.convert.tensors import Reader


def converted(folder: Path) -> dict[str, torch.Tensor]:
    """By us, from Hugging Face's tensors, under TransformerEngine's names."""
    reader = Reader()
    made = {
        target.name: reader.read(target.name, stored, 0, stored.shape[0])
        for target, stored in as_megatron(read_folder(folder), read_spec(folder), folder).items()
    }
    reader.close()
    return made


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one side has, and of tensors that differ after rounding to bf16. megatron-bridge may
    pad the vocabulary.
    """
    bad = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        theirs = found[name][: len(expected[name])]
        if not torch.equal(theirs.bfloat16(), expected[name].bfloat16()):
            bad.append(f"{name}: other values")
    return bad


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_megatron_bridge_agrees(tmp_path, arch):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed")
    model = make_tiny_model(tmp_path / "model", arch=arch)
    run_ranks("support.jobs_gpu_bridge:convert", 1, model=str(model), folder=str(tmp_path))
    assert differences(torch.load(tmp_path / "megatron.pt"), converted(model)) == []
    assert differences(torch.load(tmp_path / "hf.pt"), weights(model)) == []


def test_differences_are_seen(small_llama):
    ours = converted(small_llama)
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in ours
    padded = {k: torch.cat([v, v]) if k == "output_layer.weight" else v for k, v in ours.items()}
    assert differences(padded, ours) == []
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    swapped = ours | {name: ours[name].flip(0), "more": ours[name]}
    assert differences(swapped, ours) == ["more", f"{name}: other values"]
