"""Names at their public place."""

from . import attention, cpp_extensions, float8_tensor, ops, optimizers, router, tensor
from .attention import DotProductAttention
from .distributed import CudaRNGStatesTracker, checkpoint
from .module import Fp8Padding, Fp8Unpadding, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm
from .quantization import autocast, fp8_autocast, fp8_model_init, quantized_model_init
from .tensor import (
    Float8BlockwiseQTensor,
    Float8Tensor,
    MXFP8Tensor,
    NVFP4Tensor,
    QuantizedTensor,
)

__all__ = [
    "CudaRNGStatesTracker",
    "DotProductAttention",
    "Float8BlockwiseQTensor",
    "Float8Tensor",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
    "RMSNorm",
    "attention",
    "autocast",
    "checkpoint",
    "cpp_extensions",
    "float8_tensor",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
    "optimizers",
    "quantized_model_init",
    "router",
    "tensor",
]
