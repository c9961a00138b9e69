"""Collectives along the first dimension, activation checkpointing, and a tracker of random states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .quantization import FP8GlobalStateManager, autocast

_recompute_enabled = False
_recompute_phase = False


def size_of(group: Any) -> int:
    return 1 if group is None else group.size()


def gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Every rank's rows, in the order of ranks."""
    if size_of(group) == 1:
        return x
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over ranks of this rank's part of the rows."""
    if size_of(group) == 1:
        return x
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    if size_of(group) > 1:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
    return x


class activation_recompute_forward(AbstractContextManager, ContextDecorator):
    """Marks a pass whose activations are dropped, or the pass that computes them again."""

    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        self.activation_recompute, self.recompute_phase = activation_recompute, recompute_phase

    def __enter__(self) -> None:
        global _recompute_enabled, _recompute_phase
        _recompute_enabled = self.activation_recompute and FP8GlobalStateManager.is_fp8_enabled()
        _recompute_phase = self.recompute_phase

    def __exit__(self, *exc_details: Any) -> None:
        global _recompute_enabled, _recompute_phase
        _recompute_enabled = _recompute_phase = False


def is_fp8_activation_recompute_enabled() -> bool:
    return _recompute_enabled


def in_fp8_activation_recompute_phase() -> bool:
    return _recompute_phase


class _Checkpoint(torch.autograd.Function):
    """Runs without gradients, and again with them, in the same FP8 context, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], kwargs: dict[str, Any], *args: Any) -> Any:
        ctx.function, ctx.kwargs, ctx.args = function, kwargs, args
        ctx.fp8 = FP8GlobalStateManager.get_autocast_state()
        with torch.no_grad(), activation_recompute_forward(True, recompute_phase=False):
            return function(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        args = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in ctx.args
        ]
        enabled, _, recipe, _ = ctx.fp8
        recompute = activation_recompute_forward(True, recompute_phase=True)
        with torch.enable_grad(), recompute, autocast(enabled=enabled, recipe=recipe):
            outputs = ctx.function(*args, **ctx.kwargs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=True)
            if isinstance(out, torch.Tensor) and out.requires_grad
        ]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in args)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not kwargs.pop("use_reentrant", True) or kwargs.pop("distribute_saved_activations", False):
        raise NotImplementedError("use_reentrant=False, distribute_saved_activations")
    for name in ("tp_group", "get_rng_state_tracker", "context_fn", "determinism_check", "debug"):
        kwargs.pop(name, None)  # nothing here is random
    return _Checkpoint.apply(function, kwargs, *args)


class CudaRNGStatesTracker:
    """Keeps states by name; nothing is drawn from them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, Any] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, Any]:
        return dict(self.states_)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"seed {seed} or state {name} already exists")
        self.seeds_.add(seed)
        self.states_[name] = seed

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        yield


def get_all_rng_states() -> dict[str, Any]:
    return {}
