"""Float8BlockwiseQTensor at its own place."""

from . import Float8BlockwiseQTensor

__all__ = ["Float8BlockwiseQTensor"]
