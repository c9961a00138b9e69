"""Quantised checkpoints read back: the values that a server computes with, and their distance from the
original ones.

The formats are told apart by the tensors of a layer (shapes for a weight [rows, columns]):

    FP8 per tensor   weight float8 [rows, columns], weight_scale float32 []
    FP8 by block     weight float8, weight_scale_inv float32 [rows / 128, columns / 128]
    NVFP4            weight uint8 [rows, columns / 2], weight_scale float8 [rows, columns / 16],
                     weight_scale_2 float32 []
    INT4             weight_packed int32 [rows, columns / 8], weight_scale [rows, columns / 128]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dapo.convert.safetensors_files import read_folder
from megatron_dapo.convert.tensors import Reader
from megatron_dapo.weights.block_fp8 import BLOCK, SCALES

# E2M1: a sign bit and eight absolute values
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_NORM_OF = {"self_attn.[qkv]_proj": "input_layernorm", "mlp.(gate|up)_proj": "post_attention_layernorm"}


class Folder:
    """The tensors of a safetensors checkpoint, read whole, one at a time."""

    def __init__(self, path: Path) -> None:
        self._stored, self._reader = read_folder(path), Reader()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def read(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return self._reader.read(name, stored, 0, stored.shape[0])

    def weight(self, name: str) -> torch.Tensor:
        """The values of a weight or of anything else, float32, multiplied by its scales where it has any."""
        layer = name.removesuffix("weight")
        if layer + "weight_packed" in self:
            return _int4(self.read(layer + "weight_packed"), self.read(layer + "weight_scale"))
        values = self.read(name)
        if name + SCALES in self:
            return _by_block(values, self.read(name + SCALES))
        if values.dtype == torch.float8_e4m3fn:
            return values.float() * self.read(layer + "weight_scale")
        if values.dtype == torch.uint8:
            scales = self.read(layer + "weight_scale").float() * self.read(layer + "weight_scale_2")
            return _nvfp4(values, scales)
        return values.float()

    def is_quantised(self, name: str) -> bool:
        layer = name.removesuffix("weight")
        return any(f"{layer}weight{end}" in self for end in ("_packed", "_scale", SCALES))

    def close(self) -> None:
        self._reader.close()


def _by_block(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    whole = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * whole


def _nvfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The first of two neighbouring columns is in the low half of a byte."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1).int()
    values = torch.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)


def _int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The first of eight neighbouring columns is in the lowest bits of an integer; 8 stands for zero."""
    codes = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 0xF
    values = codes.flatten(1).float() - 8
    return values * scales.float().repeat_interleave(values.shape[1] // scales.shape[1], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Of one quantised weight. relative: Frobenius norm of the difference over that of the original.
    largest: absolute difference of an element.
    """

    name: str
    relative: float
    largest: float


def errors(original: Folder, quantised: Folder, names: Iterable[str]) -> list[Error]:
    """Of the weights among `names` that are quantised; originals count as rounded to bf16."""
    found = []
    for name in names:
        if quantised.is_quantised(name):
            before = original.read(name).to(torch.bfloat16).float()
            difference = quantised.weight(name) * _smoothing(name, original, quantised) - before
            relative = float(difference.norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
            found.append(Error(name=name, relative=relative, largest=float(difference.abs().max())))
    return found


def _smoothing(name: str, original: Folder, quantised: Folder) -> torch.Tensor:
    """AWQ multiplies columns of a weight and divides the norm before it: by how much the latter [columns]."""
    for layers, norm in _NORM_OF.items():
        if re.search(rf"\.\d+\.{layers}\.weight$", name):
            before = re.sub(rf"{layers}\.weight$", f"{norm}.weight", name)
            new, old = quantised.read(before).float(), original.read(before).to(torch.bfloat16).float()
            return torch.where(old == 0, 1.0, new / old)
    return torch.ones(())
