"""Causal attention over packed sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..distributed import all_reduce, size_of
from ..module.base import TransformerEngineBaseModule, refuse
from .zigzag import collect, places


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps (query, key, value, output, log-sum-exp); backward computes again.

    Legend: query, key and value [T, heads, head_dim] of this context-parallel rank.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bounds: list[int], scale: float, group: Any) -> Any:
        out = _attend(q, collect(k, bounds, group), collect(v, bounds, group), bounds, scale, group)
        ctx.bounds, ctx.scale, ctx.group = bounds, scale, group
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        bounds, group = ctx.bounds, ctx.group
        whole = [q, collect(k, bounds, group), collect(v, bounds, group)]
        whole = [x.detach().requires_grad_() for x in whole]
        with torch.enable_grad():
            out = _attend(*whole, bounds, ctx.scale, group)
        dq, dk, dv = torch.autograd.grad(out, whole, grads[0])
        if size_of(group) > 1:
            mine_T = places(bounds, group.size(), group.rank())
            dk, dv = (all_reduce(x, group)[mine_T] for x in (dk, dv))
        return dq, dk, dv, None, None, None


def _attend(q: Any, k: Any, v: Any, bounds: list[int], scale: float, group: Any) -> torch.Tensor:
    """This rank's queries to all keys of their sequence that are not later."""
    cp = size_of(group)
    mine_T = places(bounds, cp, group.rank() if cp > 1 else 0)
    attended = []
    for start, end in itertools.pairwise(bounds):
        here = slice(start // cp, end // cp)
        mask = mine_T[here, None] >= torch.arange(start, end)
        parts = (x.transpose(0, 1) for x in (q[here], k[start:end], v[start:end]))
        out = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scale, enable_gqa=True
        )
        attended.append(out.transpose(0, 1))
    return torch.cat(attended)


def _forgive_missing_state(module: Any, keys: Any) -> None:
    """Megatron's sharded state leaves out that of attention."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "core_attention._extra_state" not in key]


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        refuse(
            attention_dropout=attention_dropout,
            window_size=window_size,
            cross_attention=attention_type != "self",
            softmax_type=softmax_type != "vanilla",
            return_max_logit=return_max_logit,
        )
        self._join(tp_group, tp_size)
        self.layer_number = layer_number
        self.head_dim = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.num_gqa_groups_per_partition = (num_gqa_groups or num_attention_heads) // self.tp_size
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(self.head_dim)
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.register_load_state_dict_post_hook(_forgive_missing_state)

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        self.cp_group, self.cp_global_ranks = cp_group, cp_global_ranks
        self.cp_stream, self.cp_comm_type = cp_stream, cp_comm_type

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: Any = None,
        cu_seqlens_kv_padded: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Any = None,
        alibi_slopes: Any = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
    ) -> torch.Tensor:
        """[T, heads x head_dim] of this rank."""
        if qkv_format != "thd" or attn_mask_type != "padding_causal":
            raise NotImplementedError("causal attention over packed sequences only")
        qkv = (query_layer, key_layer, value_layer)
        self._check_heads(qkv)
        bounds = self._checked_bounds(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        assert bounds[-1] == len(query_layer) * size_of(self.cp_group), (
            "cu_seqlens do not end at the last token"
        )
        return _Attention.apply(*qkv, bounds, self.softmax_scale, self.cp_group).flatten(1)

    def _check_heads(self, qkv: tuple[torch.Tensor, ...]) -> None:
        assert all(x.dim() == 3 for x in qkv), "Queries, keys and values must be 3D when qkv_format is thd"
        assert len({x.dtype for x in qkv}) == 1, "Queries, keys and values must have the same data type"
        assert all(x.shape[-1] == self.head_dim for x in qkv), "Queries, keys and values must have head_dim"
        groups = self.num_gqa_groups_per_partition
        assert all(x.shape[1] == groups for x in qkv[1:]), f"Keys and values must have {groups} heads"

    def _checked_bounds(
        self, q: torch.Tensor | None, kv: torch.Tensor | None, max_q: int | None, max_kv: int | None
    ) -> list[int]:
        for bounds in (q, kv):
            assert bounds is not None and bounds.dim() == 1 and bounds.dtype == torch.int32, "cu_seqlens"
        for longest in (max_q, max_kv):
            assert isinstance(longest, int), (
                "max_seqlen as a tensor, or none, waits for the device in each layer"
            )
        assert size_of(self.cp_group) == 1 or self.cp_stream is not None, (
            "context parallelism needs cp_stream"
        )
        found = q.tolist()
        longest = max(end - start for start, end in itertools.pairwise(found))
        assert max_q >= longest, "max_seqlen_q is below the longest sequence: kernels would drop its end"
        return found
