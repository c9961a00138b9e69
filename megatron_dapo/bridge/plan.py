"""Which slice of which Hugging Face tensor a Megatron shard is. Pure arithmetic, one function for both directions.

Loading copies Hugging Face -> shard, exporting and publishing copy shard -> Hugging Face, over the same pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dapo.bridge.hf import HFModel
from megatron_dapo.bridge.names import row_of


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` rows (dim 0) or columns (dim 1): hf[hf_start : hf_start + size] is shard[start : start + size]."""

    hf: str
    dim: int
    hf_start: int
    start: int
    size: int


def pieces(megatron_name: str, model: HFModel, *, tp: int, tp_rank: int) -> list[Piece]:
    """Where each part of this tensor-parallel rank's shard lies in the checkpoint.

    `megatron_name` carries the global layer and expert numbers; for an expert `tp` is expert_tensor_parallel. A vocabulary padded to a
    multiple of `tp` has no piece for its padding.
    """
    row = row_of(megatron_name, tied=model.tied)
    if row.split == "qkv":
        return _qkv(tuple(row.hf), model, tp, tp_rank)
    whole, sizes = next(iter(row.hf.items()))
    shape = model.shape(sizes)
    if row.split == "gate_up":
        part = shape[0] // tp
        return [Piece(name, 0, part * tp_rank, part * k, part) for k, name in enumerate(row.hf)]
    if row.split == "replicated":
        return [Piece(whole, 0, 0, 0, shape[0])]
    if row.split == "row":
        part = shape[1] // tp
        return [Piece(whole, 1, part * tp_rank, 0, part)]
    part = padded_vocab(shape[0], tp) // tp
    size = min(part, shape[0] - part * tp_rank)
    return [Piece(whole, 0, part * tp_rank, 0, size)] if size > 0 else []


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Smallest multiple of `tp` that holds the vocabulary; the padding never enters a softmax."""
    return -(-vocab_size // tp) * tp


def _qkv(names: tuple[str, ...], model: HFModel, tp: int, tp_rank: int) -> list[Piece]:
    """Megatron interleaves by key/value group: the group's query heads, its key head, its value head."""
    q_name, k_name, v_name = names
    d, per_group, groups = model.head_dim, model.num_heads // model.num_kv_heads, model.num_kv_heads // tp
    found, start = [], 0
    for group in range(groups * tp_rank, groups * (tp_rank + 1)):
        for name, first, heads in ((q_name, group * per_group, per_group), (k_name, group, 1), (v_name, group, 1)):
            found.append(Piece(name, 0, first * d, start, heads * d))
            start += heads * d
    return found
