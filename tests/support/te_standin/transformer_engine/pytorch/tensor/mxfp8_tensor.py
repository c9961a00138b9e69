"""MXFP8Tensor at its own place."""

from . import MXFP8Tensor

__all__ = ["MXFP8Tensor"]
