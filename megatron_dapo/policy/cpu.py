"""The CPU backend: a shim for what Megatron-Core calls that hard-codes `cuda` or that gloo lacks, so that it
runs unmodified without CUDA. Its layers are in policy/local_layers.py.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.tensor_parallel import random as rng
from torch.overrides import TorchFunctionMode

from megatron_dapo.policy import local_layers

_CPU = torch.device("cpu")
_gloo_all_gather, _gloo_all_to_all_single = dist.all_gather, dist.all_to_all_single


class _CudaMeansCpu(TorchFunctionMode):
    """Every device argument that names CUDA means the CPU while this mode is on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        kwargs.pop("pin_memory", None)
        if (
            device is not None
            and device is not _CPU
            and (isinstance(device, int) or torch.device(device).type == "cuda")
        ):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if (
            func is torch.Tensor.type and len(args) == 1 and not kwargs
        ):  # gradient clipping asserts torch.cuda.FloatTensor
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _AsOnGpu(TorchFunctionMode):
    """While this mode is on, a tensor says that it is on a GPU, unless it was made by `cpu()` or from one
    that was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._on_host: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return id(args[0]) not in self._on_host
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (func is torch.Tensor.cpu or id(args[0]) in self._on_host):
            self._on_host[id(result)] = result
        return result


_host_copies = HybridDeviceOptimizer._get_sub_optimizer_param_groups


def _host_copies_on_host(self: HybridDeviceOptimizer, offload_fraction: float) -> Any:
    """What optimizer.cpu_offload makes: copies on the host of a share of the GPU's parameters. Here both are
    on the host.
    """
    with _AsOnGpu():
        return _host_copies(self, offload_fraction)


_sync_groups = HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers


def _sync_groups_unfused(self: HybridDeviceOptimizer) -> None:
    """Megatron updates what optimizer.cpu_offload moved with torch's fused AdamW, which rounds otherwise than
    the unfused one that updates everything else. Here both are unfused, so that offloading changes no bit.
    Each step and each load calls this, and what it changes are copies: no checkpoint holds it.
    """
    _sync_groups(self)
    for part in self.sub_optimizers:
        for group in part.param_groups:
            group["fused"] = False


def _all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
    """Megatron's token dispatcher hands over split sizes as tensors, which gloo does not take."""
    received, sent = (
        x.tolist() if isinstance(x, torch.Tensor) else x for x in (output_split_sizes, input_split_sizes)
    )
    return _gloo_all_to_all_single(output, input, received, sent, **kwargs)


def _all_gather(outputs, input, group=None, async_op=False):
    """gloo gathers equal shapes only; experts that are split over ranks gather each rank's own number of
    tokens.
    """
    if len({output.shape for output in outputs}) == 1:
        return _gloo_all_gather(outputs, input, group=group, async_op=async_op)
    received = input.new_empty(sum(len(output) for output in outputs), *input.shape[1:])
    copies = torch.cat([input] * len(outputs))
    _gloo_all_to_all_single(
        received, copies, [len(output) for output in outputs], [len(input)] * len(outputs), group=group
    )
    for output, part in zip(outputs, received.split([len(output) for output in outputs]), strict=True):
        output.copy_(part)


def _reduce_scatter(output, inputs, group=None):
    """The sum over ranks of their inputs for this rank, of which gloo wants equal shapes too."""
    received = output.new_empty(len(inputs), *output.shape)
    sizes = [len(input) for input in inputs]
    _gloo_all_to_all_single(
        received.flatten(0, 1), torch.cat(inputs), [len(output)] * len(inputs), sizes, group=group
    )
    torch.sum(received, 0, out=output)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


def install() -> None:
    """Put the shim in place for the rest of this process, once. Only call it where no CUDA device will be
    used.
    """
    if torch.cuda.Event is _Event:
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda *args: None
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_stream = lambda *args: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(
        0
    )  # recomputation saves and restores it; nothing here is random
    rng._set_cuda_rng_state = lambda *args, **kwargs: None
    local_layers.do_without_transformer_engine()
    offloading: Any = HybridDeviceOptimizer
    offloading._get_sub_optimizer_param_groups = _host_copies_on_host
    offloading._sync_hdo_param_groups_to_sub_optimizers = _sync_groups_unfused
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[assignment]
    dist.all_to_all_single, dist.all_gather, dist.reduce_scatter = (
        _all_to_all_single,
        _all_gather,
        _reduce_scatter,
    )
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]
    # Megatron asks views of its gradient buffers for .grad, which torch's Python modes turn into a warning.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    _CudaMeansCpu().__enter__()
