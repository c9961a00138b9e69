"""The old place of quantization.py."""

from ..common.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
)
from .quantization import FP8GlobalStateManager, fp8_autocast, fp8_model_init

__all__ = [
    "DelayedScaling",
    "FP8GlobalStateManager",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Format",
    "MXFP8BlockScaling",
    "fp8_autocast",
    "fp8_model_init",
]
