"""LayerNorm, which no model of the project has."""

from __future__ import annotations

from typing import Any

import torch


class LayerNorm(torch.nn.Module):
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
        raise NotImplementedError("LayerNorm")
