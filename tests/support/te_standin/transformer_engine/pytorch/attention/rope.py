"""Rotary position embedding of packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from .zigzag import places


class _Rope(torch.autograd.Function):
    """Keeps the frequencies alone; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, freqs: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        ctx.positions_T = positions_T
        ctx.save_for_backward(freqs)
        return _turn(t, freqs, positions_T, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _turn(grads[0], *ctx.saved_tensors, ctx.positions_T, -1.0), None, None


def _turn(t: torch.Tensor, freqs: torch.Tensor, positions_T: torch.Tensor, sign: float) -> torch.Tensor:
    """The first and the second half of the leading dimensions of each head are the pairs that turn."""
    angle = freqs.reshape(len(freqs), -1)[positions_T][:, None]
    turned, rest = t[..., : angle.shape[-1]].float(), t[..., angle.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * angle.cos() + sign * torch.cat((-second, first), -1) * angle.sin()
    return torch.cat((turned.to(t.dtype), rest), -1)


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: Any = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """t [T, heads, head_dim] of this context-parallel rank; freqs [positions, 1, 1, dimensions that turn]."""
    if tensor_format != "thd" or interleaved or start_positions is not None or not fused:
        raise NotImplementedError("fused rotation of packed sequences only")
    assert cu_seqlens is not None, "cu_seqlens must not be None when tensor_format is 'thd'."
    assert freqs.dtype == torch.float32, "Dtype of the freqs tensor must be float32"
    bounds = cu_seqlens.tolist()
    starts = torch.tensor(bounds)
    places_T = places(bounds, cp_size, cp_rank)
    positions_T = places_T - starts[torch.bucketize(places_T, starts[1:], right=True)]
    assert len(freqs) > int(positions_T.max()), "freqs has fewer rows than the longest sequence has tokens"
    return _Rope.apply(t, freqs, positions_T)
