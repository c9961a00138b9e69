"""Checkpoints in block FP8, quantised by vLLM's own function, and whether engines can be tried with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_dapo.weights.block_fp8 import BLOCK, SCALES, linear_weights, quantization_config

# Of models whose matrices are whole blocks on two workers; heads have 128 dimensions.
SIZES = dict(
    hidden_size=512, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128
)
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
NO_KERNELS = "" if HAS_AVX512 else "vLLM's kernels for block FP8 on a CPU need AVX-512"
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256)


def quantised(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in bf16, and linear layers in FP8 with their scales."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    made = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    with torch.compiler.set_stance("force_eager"):
        for name in linear_weights(shapes_of(tensors)):
            values, scales = per_block_cast_to_fp8(made[name], [BLOCK, BLOCK], use_ue8m0=False)
            made[name], made[name + SCALES] = values.contiguous(), scales
    return made


def write_quantised(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint of `tensors` in block FP8, with the configuration of the folder `source`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(shapes_of(tensors))}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(quantised(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rounded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that an engine in block FP8 computes with, in fp32."""
    made = quantised(tensors)
    values = {name: made[name].float() for name in tensors}
    for name in linear_weights(shapes_of(tensors)):
        scales = made[name + SCALES].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        values[name] *= scales[: values[name].shape[0], : values[name].shape[1]]
    return values


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
