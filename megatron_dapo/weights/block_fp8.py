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
LINEAR = "_proj.weight"  # how the names of linear layers' weights end, in all families of weights/names.py

Shapes = Mapping[str, tuple[int, ...]]  # by name of the Hugging Face tensor


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
