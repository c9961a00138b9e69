"""Rows of zeros that fill each expert's tokens up to what FP8 products need, and their removal."""

from __future__ import annotations

import torch

from ..quantization import FP8GlobalStateManager


class _Padding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def _padded(self, m_splits: list[int]) -> list[int]:
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        if self.align_size is None:
            self.align_size = 32 if FP8GlobalStateManager.get_fp8_recipe().mxfp8() else 16
        return [-(-size // self.align_size) * self.align_size for size in m_splits]


class Fp8Padding(_Padding):
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        padded = self._padded(m_splits)
        parts = inp.split(m_splits)
        filled = [
            torch.nn.functional.pad(part, (0, 0, 0, size - len(part)))
            for part, size in zip(parts, padded, strict=True)
        ]
        return torch.cat(filled), padded


class Fp8Unpadding(_Padding):
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        parts = inp.split(self._padded(m_splits))
        return torch.cat([part[:size] for part, size in zip(parts, m_splits, strict=True)])
