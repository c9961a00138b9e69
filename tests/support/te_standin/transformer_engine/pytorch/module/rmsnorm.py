"""RMSNorm as a layer of its own."""

from __future__ import annotations

from typing import Any

import torch

from ._products import RMSNormFunction


class RMSNorm(torch.nn.Module):
    """weight [H]. A fusible operation in the real package, which has an extra state too: empty."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if (normalized_shape is None) == (hidden_size is None):
            raise RuntimeError("one of `normalized_shape` and `hidden_size` (deprecated) must be provided")
        if params_dtype is not None and "dtype" in kwargs:
            raise RuntimeError("Both `dtype` and `params_dtype` (deprecated) kwargs are provided")
        if unknown := kwargs.keys() - {"device", "dtype", "sm_margin"}:
            raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        size = hidden_size if normalized_shape is None else normalized_shape
        like = {"device": kwargs.get("device") or "cuda", "dtype": params_dtype or kwargs.get("dtype")}
        self.weight = torch.nn.Parameter(torch.full((size,), 0.0 if zero_centered_gamma else 1.0, **like))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return RMSNormFunction.apply(inp, self.weight, self.eps, self.zero_centered_gamma)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or not state.numel(), "RMSNorm keeps no state"
