"""Megatron's local layers, which need no TransformerEngine, on a CPU and on a GPU: an RMSNorm that sequence
parallelism accepts, and causal attention over packed sequences (Megatron's own is TransformerEngine's).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import optimizer_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    random,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.nn.functional import scaled_dot_product_attention

from megatron_dapo.batching.zigzag import zigzag
from megatron_dapo.config import Fp8Config, PolicyConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.policy import fp8_rules
from megatron_dapo.policy.fp8 import quantized

# By how many tokens, or by which factor, sequences of one batch of attention may differ.
FEW_TOKENS, MUCH_LONGER = 16, 1.1


def do_without_transformer_engine() -> None:
    """Define the names of TransformerEngine that Megatron's local layers and optimizer look up even where it
    is not installed, for the rest of this process.
    """
    for name in ("activation_recompute_forward", "fp8_autocast"):  # recomputation of a norm calls them
        setattr(random, name, lambda **kwargs: contextlib.nullcontext())
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)  # type: ignore[attr-defined]
    moe_utils.te_general_gemm = None
    optimizer_config.is_te_min_version = lambda *args: False


def block_submodules(
    spec: ModelSpec, policy: PolicyConfig, numbers: Sequence[int], amax_group: Any
) -> TransformerBlockSubmodules:
    """A model chunk with these layers of the whole model; with policy.fp8 those that compute in FP8 emulate
    it.
    """
    layers = [
        layer_spec(
            spec,
            policy.fp8 if fp8_rules.is_quantized(policy.fp8, number, spec.num_layers) else None,
            amax_group,
        )
        for number in numbers
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)  # type: ignore[arg-type]


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
                "packed attention has no attention_dropout; reinforcement learning runs without dropout"
            )

    def forward(
        self, query, key, value, attention_mask=None, *, packed_seq_params: PackedSeqParams, **kwargs: Any
    ):
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        group = packed_seq_params.cp_group
        if group is not None and group.size() > 1:
            return self._split(query, key, value, bounds, group).flatten(1)
        rows_P, shapes, places_T = _side_by_side(tuple(bounds), query.device)
        sizes = [count * longest for count, longest in shapes]
        padded = (x.index_select(0, rows_P).split(sizes) for x in (query, key, value))
        attended = []
        for shape, *parts in zip(shapes, *padded, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
            attended.append(_attend(q, k, v, None).transpose(1, 2).flatten(0, 1))
        return torch.cat(attended).index_select(0, places_T).flatten(1)

    def _split(self, query, key, value, bounds: list[int], group: Any) -> torch.Tensor:
        cp = group.size()
        order = torch.cat([zigzag(bounds, cp, rank) for rank in range(cp)]).argsort().to(query.device)
        key, value = (gather_from_sequence_parallel_region(x, True, group=group)[order] for x in (key, value))
        mine_T = zigzag(bounds, cp, group.rank()).to(query.device)
        attended = []
        for start, end in itertools.pairwise(bounds):
            here = slice(start // cp, end // cp)
            mask = mine_T[here, None] >= torch.arange(start, end, device=query.device)
            q, k, v = (x.transpose(0, 1)[None] for x in (query[here], key[start:end], value[start:end]))
            attended.append(_attend(q, k, v, mask)[0].transpose(0, 1))
        return torch.cat(attended)


def _attend(query, key, value, mask: torch.Tensor | None) -> torch.Tensor:
    """[N, heads, tokens, head_dim], causal without a mask, by a kernel that keeps no scores: on a GPU flash
    attention, or where that lacks something (masks, fp32) one that wants as many heads of key and value as of
    the query.
    """
    repeat = query.shape[1] // key.shape[1]
    if query.is_cuda and (mask is not None or query.dtype == torch.float32):
        key, value, repeat = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=repeat > 1
    )


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _side_by_side(
    bounds: tuple[int, ...], device: torch.device
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
    return torch.cat(rows).to(device), shapes, places_T.to(device)


def layer_spec(model: ModelSpec, fp8: Fp8Config | None = None, amax_group: Any = None) -> ModuleSpec:
    """Megatron's local transformer layer with the two modules above and, with `fp8`, linear layers that
    emulate it.
    """
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
