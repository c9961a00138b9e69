"""Tiny models, rollouts to calibrate on, and quantised exports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from megatron_dapo.convert.logit_gap import Rollout
from megatron_dapo.convert.quantized import Quantisation, Result, export_quantised
from megatron_dapo.weights.block_fp8 import BLOCK, SCALES
from support.convert_runs import weights
from support.models import make_tiny_model

CASES = [(arch, scheme) for arch in ("qwen2", "qwen3_moe") for scheme in ("fp8", "fp8_block", "nvfp4")]
CASES.append(("llama", "int4_awq"))


def rollouts(num: int = 4, length: int = 24) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (num, length), generator=generator).tolist()
    return [Rollout(tuple(row), 5 + i) for i, row in enumerate(tokens)]


class Exports:
    """Each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], Result] = {}

    def model(self, arch: str, seed: int = 0) -> Path:
        folder = self._folder / f"{arch}-{seed}"
        if not folder.is_dir():
            # what vLLM needs of FP8 in blocks, and INT4 in groups of 128
            sizes: dict[str, Any] = dict(hidden=256, heads=8, kv_heads=4, ffn=384)
            make_tiny_model(folder, seed=seed, **(sizes | {"arch": arch}))
        return folder

    def made(self, arch: str, scheme: str) -> Result:
        if (arch, scheme) not in self._made:
            out = self._folder / f"{arch}-{scheme}"
            job = Quantisation(source=self.model(arch), out=out, scheme=scheme)
            self._made[arch, scheme] = export_quantised(job, rollouts(), say=lambda text: None)
        return self._made[arch, scheme]


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """fp32 weights of a quantised folder by their Hugging Face names."""
    stored = weights(folder)
    made = {}
    for name, values in stored.items():
        layer, kind = name.rsplit(".", 1)
        if kind == "weight_packed":
            shape = torch.Size(stored[f"{layer}.weight_shape"].tolist())
            codes = unpack_from_int32(values, 4, shape).float()
            made[f"{layer}.weight"] = codes * stretched(stored[f"{layer}.weight_scale"], shape[1])
        elif kind == "weight" and name + SCALES in stored:
            made[name] = values.float()
            for row, scales in enumerate(stored[name + SCALES]):
                for column, scale in enumerate(scales):
                    made[name][row * BLOCK :, column * BLOCK :][:BLOCK, :BLOCK] *= scale
        elif kind == "weight" and values.dtype == torch.uint8:
            scales = stored[f"{layer}.weight_scale"].float() * stored[f"{layer}.weight_scale_2"]
            pairs = [[fp4(int(byte) & 15), fp4(int(byte) >> 4)] for byte in range(256)]
            codes = torch.tensor(pairs)[values.int()].flatten(1)
            made[name] = codes * stretched(scales, codes.shape[1])
        elif kind == "weight" and f"{layer}.weight_scale" in stored:
            made[name] = values.float() * stored[f"{layer}.weight_scale"]
        elif kind in ("weight", "bias"):
            made[name] = values.float()
    return made


def fp4(code: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    value = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -value if code & 8 else value


def stretched(scales: torch.Tensor, columns: int) -> torch.Tensor:
    return scales.float()[:, torch.arange(columns) // (columns // scales.shape[1])]
