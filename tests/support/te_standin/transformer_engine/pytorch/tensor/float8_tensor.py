"""Float8Tensor at its own place."""

from . import Float8Tensor

__all__ = ["Float8Tensor"]
