"""The general product, which routers of experts call."""

from __future__ import annotations

from typing import Any

import torch


def general_gemm(
    A: torch.Tensor,
    B: torch.Tensor,
    workspace: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool = False,
    gelu_in: Any = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Any = None,
    bias: torch.Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
) -> tuple[torch.Tensor, None, None, None]:
    """The letters say whether A and B are transposed as cuBLAS, which reads rows as columns, sees them: TN is
    B @ A.T.
    """
    if gelu or accumulate or out is not None or ub is not None or (grad and bias is not None):
        raise NotImplementedError("a plain product only")
    left = B.t() if layout[1] == "T" else B
    right = A.t() if layout[0] == "T" else A
    product = left.float() @ right.float()
    if bias is not None:
        product = product + bias.float()
    return product.to(out_dtype or A.dtype), None, None, None
