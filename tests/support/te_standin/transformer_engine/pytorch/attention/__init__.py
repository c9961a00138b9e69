"""Attention."""

from . import rope as rope
from .dot_product_attention import DotProductAttention

__all__ = ["DotProductAttention", "rope"]
