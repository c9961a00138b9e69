"""NVFP4Tensor at its own place."""

from . import NVFP4Tensor

__all__ = ["NVFP4Tensor"]
