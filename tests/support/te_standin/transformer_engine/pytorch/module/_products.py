"""Products and norms with their gradients written out: what is kept for the backward pass is what the real
kernels keep without FP8 (a column-parallel layer its own part of a sequence-parallel input, gathered again).
"""

from __future__ import annotations

from typing import Any

import torch

from ..distributed import all_reduce, gather, reduce_scatter


def normalised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [..., H], and 1 / root mean square [..., 1] in fp32."""
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    gamma = weight.float() + (1.0 if zero_centered else 0.0)
    return (x.float() * rsigma * gamma).to(x.dtype), rsigma


def normalised_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rsigma: torch.Tensor, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight."""
    unit, gamma = x.float() * rsigma, weight.float() + (1.0 if zero_centered else 0.0)
    scaled = grad.float() * gamma
    dx = rsigma * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> Any:
        out, rsigma = normalised(x, weight, eps, zero_centered)
        ctx.zero_centered = zero_centered
        ctx.save_for_backward(x, weight, rsigma)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *normalised_backward(grads[0], *ctx.saved_tensors, ctx.zero_centered), None, None


class ParallelProduct(torch.autograd.Function):
    """x [..., K] times weight [N, K] transposed, in one tensor-parallel mode, after the norm `norm_weight` if
    there is one. `used`: the values of the weight that the products take.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        used: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        layer: Any,
    ) -> torch.Tensor:
        ctx.layer, ctx.has_bias = layer, bias is not None
        local, norm = x, ()
        if norm_weight is not None:
            local, rsigma = normalised(x, norm_weight, layer.eps, layer.zero_centered_gamma)
            norm = (x, norm_weight, rsigma)
        sp, group = layer.sequence_parallel, layer.tp_group
        whole = gather(local, group) if layer.parallel_mode == "column" and sp else local
        if layer.parallel_mode == "row":
            out = whole @ used.t()
            out = reduce_scatter(out, group) if sp else all_reduce(out, group)
            out = out if bias is None else out + bias
        else:
            out = torch.nn.functional.linear(whole, used, bias)
        ctx.save_for_backward(local, used, *norm)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,), layer = grads, ctx.layer
        local, used, *norm = ctx.saved_tensors
        sp, group, mode = layer.sequence_parallel, layer.tp_group, layer.parallel_mode
        bias_grad = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        if mode == "row" and sp:
            grad = gather(grad, group)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            whole = gather(local, group) if mode == "column" and sp else local
            weight_grad = grad.flatten(0, -2).t() @ whole.flatten(0, -2)
        dx, norm_grad = grad @ used, None
        if mode == "column":
            dx = reduce_scatter(dx, group) if sp else all_reduce(dx, group)
        if norm:
            dx, norm_grad = normalised_backward(dx, *norm, layer.zero_centered_gamma)
        return dx, weight_grad, None, bias_grad, norm_grad, None
