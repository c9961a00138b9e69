"""The CPU backend: what Megatron-Core needs to run unmodified without CUDA, over gloo.

Three things: a shim for calls that hard-code `cuda` or that gloo lacks, an RMSNorm that sequence parallelism
accepts, and causal attention over packed sequences (Megatron's own packed attention lives in
TransformerEngine, which needs a GPU).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel import random as rng
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.overrides import TorchFunctionMode

from megatron_dapo.batching.zigzag import zigzag
from megatron_dapo.config import Fp8Config
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.policy.fp8 import quantized

_CPU = torch.device("cpu")
# By how many tokens, or by which factor, sequences of one batch of attention may differ.
FEW_TOKENS, MUCH_LONGER = 16, 1.1
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
    for name in (
        "activation_recompute_forward",
        "fp8_autocast",
    ):  # TransformerEngine's, which recomputation of a norm calls
        setattr(rng, name, lambda **kwargs: contextlib.nullcontext())
    rng.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)  # type: ignore[attr-defined]
    moe_utils.te_general_gemm = None  # undefined without TransformerEngine
    optimizer_config.is_te_min_version = lambda *args: False  # fails without TransformerEngine
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


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its weight gradient over sequence-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(torch.nn.Module):
    """Causal attention inside each packed sequence; query, key and value are [T, heads, head_dim].

    Sequences of similar length are put side by side, padded on the right (a causal query never sees later
    keys), and go through one `scaled_dot_product_attention` call, so cost grows with the tokens and not with
    the pack squared.

    Under context parallelism every rank gathers all keys and values (their gradients are summed on the way
    back) and attends with its own queries, at their positions in the sequence.
    """

    def __init__(self, config: Any, layer_number: int, **kwargs: Any) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(
                "attention_dropout is not supported on CPU; reinforcement learning runs without dropout"
            )

    def forward(
        self, query, key, value, attention_mask=None, *, packed_seq_params: PackedSeqParams, **kwargs: Any
    ):
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        group = packed_seq_params.cp_group
        if group is not None and group.size() > 1:
            return self._split(query, key, value, bounds, group).flatten(1)
        repeat = query.shape[1] // key.shape[1]
        rows_P, shapes, places_T = _side_by_side(tuple(bounds))
        sizes = [count * longest for count, longest in shapes]
        padded = (x.index_select(0, rows_P).split(sizes) for x in (query, key, value))
        attended = []
        for shape, *parts in zip(shapes, *padded, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=repeat > 1
            )
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended).index_select(0, places_T).flatten(1)

    def _split(self, query, key, value, bounds: list[int], group: Any) -> torch.Tensor:
        cp = group.size()
        order = torch.cat([zigzag(bounds, cp, rank) for rank in range(cp)]).argsort()
        key, value = (gather_from_sequence_parallel_region(x, True, group=group)[order] for x in (key, value))
        mine_T = zigzag(bounds, cp, group.rank())
        attended = []
        for start, end in itertools.pairwise(bounds):
            here = slice(start // cp, end // cp)
            mask = mine_T[here, None] >= torch.arange(start, end)
            q, k, v = (x.transpose(0, 1) for x in (query[here], key[start:end], value[start:end]))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=q.shape[0] > k.shape[0]
            )
            attended.append(out.transpose(0, 1))
        return torch.cat(attended)


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _side_by_side(
    bounds: tuple[int, ...],
) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor]:
    """Sequences put into batches of similar length. Returns the packed token of each place in the batches
    [P], where padding repeats a sequence's last; number and padded length of each batch's sequences; and the
    place of each packed token [T].
    """
    sequences = sorted(itertools.pairwise(bounds), key=lambda sequence: sequence[1] - sequence[0])
    batches: list[list[tuple[int, int]]] = []
    limit = 0
    for start, end in sequences:
        if end == start:
            continue
        if end - start > limit:
            batches.append([])
            limit = max(end - start + FEW_TOKENS, int((end - start) * MUCH_LONGER))
        batches[-1].append((start, end))
    rows, shapes, places_T, first = [], [], torch.empty(bounds[-1], dtype=torch.int64), 0
    for members in batches:
        starts, ends = (torch.tensor(column)[:, None] for column in zip(*members, strict=True))
        offsets = starts + torch.arange(int((ends - starts).max()))
        rows.append(torch.minimum(offsets, ends - 1).flatten())
        shapes.append((offsets.shape[0], offsets.shape[1]))
        places_T[offsets[offsets < ends]] = first + (offsets < ends).flatten().nonzero().squeeze(1)
        first += offsets.numel()
    return torch.cat(rows), shapes, places_T


def layer_spec(model: ModelSpec, fp8: Fp8Config | None = None, amax_group: Any = None) -> ModuleSpec:
    """Megatron's local transformer layer with the two modules above and, with `fp8`, linear layers that
    emulate it.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts or None, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if fp8 is not None:
        column, row = (quantized(kind, fp8, amax_group) for kind in (ColumnParallelLinear, RowParallelLinear))
        attention.linear_qkv, attention.linear_proj = column, row
        mlp = _submodules(spec.submodules.mlp)
        if model.num_experts:
            mlp = _submodules(mlp.experts)
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    return spec


def _submodules(part: Any) -> Any:
    """Those of a ModuleSpec or, since megatron-core 0.19, of a partial."""
    return (part.keywords if isinstance(part, functools.partial) else vars(part))["submodules"]
