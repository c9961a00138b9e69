"""Runs code that was written for CUDA on the CPU, unchanged: `install()`, once a process, before a model is
built.

Devices that name CUDA become the CPU wherever torch is given one, the bookkeeping of torch.cuda does nothing,
and NCCL becomes gloo. Of Megatron nothing is replaced but the two functions that read and write CUDA's random
state.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
CAPABILITY = (9, 0)  # of the GPU that torch.cuda tells of: an H100
TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}


class _CudaMeansCpu(TorchFunctionMode):
    """Every argument that names a CUDA device means the CPU while this mode is on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.device:
            return CPU if isinstance(args[0], int) else _mapped(func(*args, **kwargs))
        if func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.record_stream):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # gradient clipping asks for CUDA's
            return f"torch.cuda.{TYPES[args[0].dtype]}"
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = CPU
        return func(*(_mapped(x) for x in args), **{name: _mapped(x) for name, x in kwargs.items()})

    def _backward(
        self, tensors, grad_tensors=None, retain_graph=None, create_graph=False, **other: Any
    ) -> None:
        """A mode is off inside its own handler, but what a backward pass runs needs it: the engine is called
        under it, without torch's functions around.
        """
        roots = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        grads = other.get("gradient", grad_tensors)
        grads = (grads,) * len(roots) if grads is None or isinstance(grads, torch.Tensor) else tuple(grads)
        grads = tuple(torch.ones_like(r) if g is None else g for r, g in zip(roots, grads, strict=True))
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                roots,
                grads,
                bool(retain_graph),
                create_graph,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _mapped(value: Any) -> Any:
    names_cuda = isinstance(value, torch.device) and value.type == "cuda"
    names_cuda = names_cuda or (isinstance(value, str) and value.partition(":")[0] == "cuda")
    return CPU if names_cuda else value


class _Idle:
    """A stream or an event with nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *args: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _Idle()


def install() -> None:
    _pretend_device()
    _pretend_nccl()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = torch.cuda.set_rng_state
    # Megatron asks views of its gradient buffers for .grad, which torch's Python modes turn into a warning.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    _CudaMeansCpu().__enter__()


def _pretend_device() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "set_rng_state"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "memory_reserved", "current_device"):
        setattr(cuda, name, lambda *args: 0)
    cuda.current_stream = cuda.default_stream = lambda *args: _Idle()
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Idle
    cuda.get_device_capability = lambda *args: CAPABILITY
    torch.version.cuda = "12.9"  # type: ignore[assignment]
    # nothing is random once weights are loaded; torch.manual_seed calls these two
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.empty(0)


def _pretend_nccl() -> None:
    """gloo, made to take the split sizes and unequal shapes that Megatron hands to NCCL for experts."""
    from megatron_dapo.policy import cpu

    begin, new = dist.init_process_group, dist.new_group
    collectives: Any = dist
    collectives.init_process_group = lambda backend=None, *args, **kwargs: begin("gloo", *args, **kwargs)
    collectives.new_group = lambda *args, **kwargs: new(
        *args, **(kwargs | {"backend": "gloo", "pg_options": None})
    )
    collectives.all_to_all_single = cpu._all_to_all_single
    collectives.all_gather = cpu._all_gather
    collectives.reduce_scatter = cpu._reduce_scatter
