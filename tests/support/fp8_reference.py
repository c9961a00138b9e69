"""FP8 quantisation from the formats' definition: all values listed, scales by loops over blocks, in
float64.
"""

from __future__ import annotations

import itertools
import math

import torch

from megatron_dapo.policy.fp8 import E4M3, E5M2


def representable(bits: int, bias: int, largest: float) -> list[float]:
    """The positive values of a float with `bits` mantissa bits, in order; the place in the list is even where
    the mantissa is.
    """
    found = [m * 2.0 ** (1 - bias - bits) for m in range(2**bits)]
    for exponent, m in itertools.product(range(1, 32), range(2**bits)):
        found.append((1 + m / 2**bits) * 2.0 ** (exponent - bias))
    return [value for value in found if value <= largest]


TABLES = {E4M3: representable(3, 7, 448.0), E5M2: representable(2, 15, 57344.0)}


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    table = torch.tensor(TABLES[dtype], dtype=torch.float64)
    size = x.double().abs().clamp(max=table[-1])
    above = torch.searchsorted(table, size).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - size, size - table[below]
    return x.double().sign() * torch.where(
        (up < down) | ((up == down) & (above % 2 == 0)), table[above], table[below]
    )


def quantize(x_RC: torch.Tensor, block: tuple[int, int], dtype: torch.dtype, *, power: bool) -> torch.Tensor:
    """Block by block, in float64."""
    x_RC = x_RC.double()
    out = torch.empty_like(x_RC)
    for r, c in itertools.product(range(0, x_RC.shape[0], block[0]), range(0, x_RC.shape[1], block[1])):
        part = x_RC[r : r + block[0], c : c + block[1]]
        scale = TABLES[dtype][-1] / (float(part.abs().max()) or TABLES[dtype][-1])
        scale = 2.0 ** math.floor(math.log2(scale)) if power else scale
        out[r : r + block[0], c : c + block[1]] = nearest(part * scale, dtype) / scale
    return out


def operand(x_RC: torch.Tensor, recipe: str, role: str, along: int, dtype: torch.dtype) -> torch.Tensor:
    if recipe == "tensorwise":
        return quantize(x_RC, tuple(x_RC.shape), dtype, power=False)
    size = {"blockwise": 128, "mxfp8": 32}[recipe]
    if recipe == "blockwise" and role == "weight":
        return quantize(x_RC, (size, size), dtype, power=True)
    return quantize(x_RC, (1, size) if along == 1 else (size, 1), dtype, power=True)
