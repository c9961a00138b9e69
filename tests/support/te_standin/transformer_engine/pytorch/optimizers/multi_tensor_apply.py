"""Norms and scaling of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MultiTensorApply:
    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(self, op: Callable[..., Any], noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
