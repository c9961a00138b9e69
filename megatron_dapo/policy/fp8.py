"""FP8 on the CPU: the rounding that TransformerEngine's matrix products do, in fp32 arithmetic.

Every operand of the three products of a linear layer is quantised to FP8 and back before the product:

    forward          out_TN   = input_TK  @ weight_NK.T      contracts K
    input gradient   dgrad_TK = grad_TN   @ weight_NK        contracts N
    weight gradient  wgrad_NK = grad_TN.T @ input_TK         contracts T

An FP8 value stands for `value / scale`. The recipes differ in who shares a scale and where it comes from:

    tensorwise  one fp32 scale per tensor, from its own largest value
    delayed     one fp32 scale per tensor, from the largest value of the previous pass (Megatron's default
    history of one)
    blockwise   a power of two per 1 x 128 values along the contraction, per 128 x 128 of the weight
    mxfp8       a power of two per 1 x 32 values along the contraction

Sources: TransformerEngine's common/recipe/__init__.py (formats, block shapes, `power_2_scale` of
Float8BlockScaling), common/recipe/recipe_common.cuh (scales), common/recipe/delayed_scaling.cu (history).
docs/fp8.md says what is not modelled.

Legend: T tokens, N outputs, K inputs; R rows and C columns of any of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_dapo.config import Fp8Config

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = {"blockwise": 128, "mxfp8": 32}


def scale_of(amax: torch.Tensor, dtype: torch.dtype, *, power_of_two: bool) -> torch.Tensor:
    """fp32 scales that bring `amax` to the largest value of `dtype`; rounded down to a power of two, so that
    nothing overflows.

    1 where `amax` is 0, infinite or NaN; the largest fp32 where the scale itself would overflow.
    """
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        _, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent with mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def block_scales(x_RC: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Power-of-two scales [R, C], one per block of `block` rows and columns; the last blocks may be
    smaller.
    """
    (R, C), (r, c) = x_RC.shape, block
    padded = torch.nn.functional.pad(x_RC.abs(), (0, -C % c, 0, -R % r))
    amax = padded.unflatten(1, (-1, c)).unflatten(0, (-1, r)).amax((1, 3))
    scale = scale_of(amax, dtype, power_of_two=True)
    return scale.repeat_interleave(r, 0).repeat_interleave(c, 1)[:R, :C]


def round_trip(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values to FP8 and back: to the nearest, ties to even; too large ones become the largest; NaN
    stays.
    """
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype).float() * (1 / scale)


class Quantizer:
    """How one linear layer quantises its input, weight and gradient.

    Only `delayed` keeps state: the scale in use and the largest value seen since it was set, per role. Both
    are the same on all ranks of `amax_group` (None: this rank alone).
    """

    def __init__(self, fp8: Fp8Config, amax_group: Any = None) -> None:
        self.fp8, self.amax_group = fp8, amax_group
        self.scale = {"input": 1.0, "weight": 1.0, "grad": 1.0}
        self.amax = {"input": 0.0, "weight": 0.0, "grad": 0.0}

    def __call__(self, x_RC: torch.Tensor, role: str, *, along: int) -> torch.Tensor:
        """The fp32 values [R, C] that the product contracting dimension `along` sees of `x_RC`."""
        dtype, recipe = self._dtype(role), self.fp8.recipe
        if not x_RC.numel():  # an expert that no token was sent to
            return x_RC
        if recipe == "delayed":
            self.amax[role] = max(self.amax[role], float(x_RC.abs().max()))
            scale = torch.tensor(self.scale[role])
        elif recipe == "tensorwise":
            scale = scale_of(x_RC.abs().max(), dtype, power_of_two=False)
        else:
            size = BLOCK[recipe]
            square = recipe == "blockwise" and role == "weight"
            block = (size, size) if square else (size, 1) if along == 0 else (1, size)
            scale = block_scales(x_RC, block, dtype)
        return round_trip(x_RC, scale, dtype)

    def end_pass(self, *roles: str) -> None:
        """Delayed scaling: what was seen up to now sets the scales of the next pass. Collective."""
        if self.fp8.recipe != "delayed":
            return
        amax = torch.tensor([self.amax[role] for role in roles])
        if self.amax_group is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.amax_group)
        for role, largest in zip(roles, amax, strict=True):
            if largest.isfinite() and largest > 0:
                self.scale[role] = float(torch.finfo(self._dtype(role)).max / largest)
            self.amax[role] = 0.0

    def _dtype(self, role: str) -> torch.dtype:
        return E5M2 if role == "grad" and self.fp8.format == "hybrid" else E4M3


class QuantizedProduct(torch.autograd.Function):
    """x [..., K] times weight [N, K] transposed, with the operands of all three products quantised."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, quantizer: Quantizer, training: bool
    ) -> torch.Tensor:
        x_TK, weight_NK = x.flatten(0, -2).float(), weight.float()
        out_TN = quantizer(x_TK, "input", along=1) @ quantizer(weight_NK, "weight", along=1).T
        if training:  # as TransformerEngine, which does not update delayed scales in passes without gradient
            ctx.save_for_backward(quantizer(x_TK, "input", along=0), quantizer(weight_NK, "weight", along=0))
            ctx.quantizer, ctx.dtypes = quantizer, (x.dtype, weight.dtype)
            quantizer.end_pass("input", "weight")
        return out_TN.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (grad,), (x_TK, weight_NK), quantizer = grads, ctx.saved_tensors, ctx.quantizer
        grad_TN = grad.flatten(0, -2).float()
        dgrad_TK = quantizer(grad_TN, "grad", along=1) @ weight_NK
        wgrad_NK = quantizer(grad_TN, "grad", along=0).T @ x_TK
        quantizer.end_pass("grad")
        x_dtype, weight_dtype = ctx.dtypes
        return dgrad_TK.to(x_dtype).view(*grad.shape[:-1], -1), wgrad_NK.to(weight_dtype), None, None


def quantized(linear: Any, fp8: Fp8Config, amax_group: Any) -> Any:
    """Megatron's ColumnParallelLinear or RowParallelLinear with the product above.

    Each rank scales the product it computes: its own shard of the weight and, after a sequence-parallel
    gather, all tokens.
    """

    class Quantized(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.quantizer = Quantizer(fp8, amax_group)

        def _forward_impl(
            self, input, weight, bias, *, allreduce_dgrad, sequence_parallel, tp_group, **fusions: Any
        ):
            if sequence_parallel:
                input = gather_from_sequence_parallel_region(input, group=tp_group)
            elif allreduce_dgrad:
                input = copy_to_tensor_model_parallel_region(input, group=tp_group)
            out = QuantizedProduct.apply(input, weight, self.quantizer, torch.is_grad_enabled())
            return out if bias is None else out + bias

        def get_extra_state(self) -> Any:
            """Delayed scales are part of a checkpoint."""
            return (
                {"scale": self.quantizer.scale, "amax": self.quantizer.amax}
                if fp8.recipe == "delayed"
                else None
            )

        def set_extra_state(self, state: Any) -> None:
            if state and fp8.recipe == "delayed":
                self.quantizer.scale, self.quantizer.amax = dict(state["scale"]), dict(state["amax"])

    return Quantized
