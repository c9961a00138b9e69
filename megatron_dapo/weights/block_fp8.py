"""The format of checkpoints in block FP8 (DeepSeek's): `quant_method: fp8`, `weight_block_size: [128, 128]`.

A linear layer has a `weight` in float8_e4m3fn and a `weight_scale_inv` in float32, with a number for each
block of 128 x 128: the block's values times that number are the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

BLOCK = 128  # rows and columns
SCALES = "_scale_inv"  # behind the name of a weight: the tensor of its blocks' scales
SMALLEST_MAXIMUM = 1e-4  # a block's largest value counts as at least this, as in vLLM
LINEAR = "_proj.weight"  # how the names of linear layers' weights end, in all families of weights/names.py

Shapes = Mapping[str, tuple[int, ...]]  # by name of the Hugging Face tensor


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in float8_e4m3fn, of the shape of `weight`; `block_scales`): bit for bit what vLLM makes of a
    bf16 weight (vllm/utils/deep_gemm.py, per_block_cast_to_fp8) on a CPU.
    """
    rows, columns = weight.shape
    scales = block_scales(weight)
    values = _blocks(weight) * (1.0 / scales)[:, None, :, None]
    whole = values.to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    return whole[:rows, :columns], scales


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """float32 [rows / 128, columns / 128], rounded up: the blocks' largest values over that of FP8."""
    largest = _blocks(weight).abs().amax(dim=(1, 3)).float().clamp(min=SMALLEST_MAXIMUM)
    # by a tensor: a GPU multiplies by the reciprocal of a number, which rounds differently
    return largest / torch.full_like(largest, torch.finfo(torch.float8_e4m3fn).max)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """[block, row in it, block, column in it]; with zeros where the weight ends inside a block."""
    rows, columns = weight.shape
    missing = (0, -columns % BLOCK, 0, -rows % BLOCK)
    if any(missing):
        weight = torch.nn.functional.pad(weight, missing)
    return weight.reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)


def linear_weights(shapes: Shapes) -> Shapes:
    """The tensors that are quantised: not embeddings, head, norms, biases and routers of experts."""
    return {name: shape for name, shape in shapes.items() if name.endswith(LINEAR)}


def scale_shapes(linear: Shapes) -> Shapes:
    """The tensors that a checkpoint has in addition when these of it are quantised."""
    return {name + SCALES: tuple(-(-size // BLOCK) for size in shape) for name, shape in linear.items()}


def checkpoint_facts(shapes: Shapes, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor of a checkpoint of these: what has scales is in FP8, all else in
    `dtype`.
    """

    def dtype_of(name: str) -> torch.dtype:
        if name + SCALES in shapes:
            return torch.float8_e4m3fn
        return torch.float32 if name.endswith(SCALES) else dtype

    return {name: (tuple(shape), dtype_of(name)) for name, shape in shapes.items()}


def quantization_config(shapes: Shapes) -> dict[str, Any]:
    """What the config.json of the quantised checkpoint has under this name. shapes: without scales."""
    kept = [name for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(LINEAR)]
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name.removesuffix(".weight") for name in kept],
    }
