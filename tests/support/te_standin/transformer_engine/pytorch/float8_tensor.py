"""The old place of a class of tensor/."""

from .tensor import Float8Tensor

__all__ = ["Float8Tensor"]
