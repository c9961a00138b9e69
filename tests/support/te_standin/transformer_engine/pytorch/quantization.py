"""Which FP8 context is on, and a log of the layers that ran in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..common.recipe import DelayedScaling, Recipe


@dataclass(frozen=True)
class Run:
    """A forward pass of one layer in an FP8 context. recomputed: to have activations for a backward pass.
    training: with gradients, or the first pass of a checkpointed function.
    """

    module: torch.nn.Module
    recipe: Recipe
    recomputed: bool
    training: bool


@dataclass
class DelayedScalingRecipeState:
    """Scales [tensors] and the largest values of the last passes [passes, tensors]. Never updated here."""

    scale: torch.Tensor
    amax_history: torch.Tensor


class FP8GlobalStateManager:
    """`log` is this stand-in's own."""

    FP8_ENABLED = False
    FP8_CALIBRATION = False
    FP8_RECIPE: Recipe | None = None
    FP8_DISTRIBUTED_GROUP: Any = None
    log: list[Run] = []

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.FP8_ENABLED

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return cls.FP8_CALIBRATION

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return False

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        return False

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return cls.FP8_RECIPE or DelayedScaling()

    @classmethod
    def get_fp8_group(cls) -> Any:
        return cls.FP8_DISTRIBUTED_GROUP

    @classmethod
    def get_autocast_state(cls) -> tuple[bool, bool, Recipe | None, Any]:
        return cls.FP8_ENABLED, cls.FP8_CALIBRATION, cls.FP8_RECIPE, cls.FP8_DISTRIBUTED_GROUP

    @classmethod
    def set_autocast_state(cls, fp8_state: tuple[bool, bool, Recipe | None, Any]) -> None:
        cls.FP8_ENABLED, cls.FP8_CALIBRATION, cls.FP8_RECIPE, cls.FP8_DISTRIBUTED_GROUP = fp8_state

    @classmethod
    def reset(cls) -> None:
        cls.set_autocast_state((False, False, None, None))
        cls.log.clear()


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before = FP8GlobalStateManager.get_autocast_state()
    recipe = recipe or DelayedScaling()
    FP8GlobalStateManager.set_autocast_state((enabled, calibrating, recipe, amax_reduction_group))
    try:
        yield
    finally:
        FP8GlobalStateManager.set_autocast_state(before)


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    with autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph):
        yield


@contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    if enabled:
        raise NotImplementedError("FP8 parameters")
    yield


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    with quantized_model_init(enabled, recipe, preserve_high_precision_init_val):
        yield
