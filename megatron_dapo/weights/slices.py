"""Which slice of which Hugging Face tensor a Megatron shard is. Pure arithmetic, the same both ways.

Loading a checkpoint copies Hugging Face tensor -> shard; publishing and exporting copy shard -> Hugging Face
tensor. Both walk over the same slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.weights.names import row_of


@dataclass(frozen=True, slots=True)
class Slice:
    """`size` rows (dim 0) or columns (dim 1) that a Hugging Face tensor and a shard have in common:
    hf[hf_start : hf_start + size] is shard[start : start + size].
    """

    hf: str  # name of the Hugging Face tensor
    dim: int
    hf_start: int
    start: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A parameter of this rank, and where its values belong in the checkpoint.

    `name` is Megatron's, with global layer and expert numbers. `tensor` is the live parameter, on any device.
    """

    name: str
    tensor: torch.Tensor
    slices: tuple[Slice, ...]


def slices_of(megatron_name: str, model: ModelSpec, *, tp: int, tp_rank: int) -> list[Slice]:
    """Where each part of this tensor-parallel rank's shard lies in the checkpoint.

    `megatron_name` carries the global layer and expert numbers; for an expert `tp` is expert_tensor_parallel.
    A vocabulary padded to a multiple of `tp` has no slice for its padding.
    """
    row = row_of(megatron_name, tied=model.tied)
    if row.split == "qkv":
        return _qkv(tuple(row.hf), model, tp, tp_rank)
    whole, sizes = next(iter(row.hf.items()))
    shape = model.shape(sizes)
    if row.split == "gate_up":
        part = shape[0] // tp
        return [Slice(name, 0, part * tp_rank, part * k, part) for k, name in enumerate(row.hf)]
    if row.split == "replicated":
        return [Slice(whole, 0, 0, 0, shape[0])]
    if row.split == "row":
        part = shape[1] // tp
        return [Slice(whole, 1, part * tp_rank, 0, part)]
    part = padded_vocab(shape[0], tp) // tp
    size = min(part, shape[0] - part * tp_rank)
    return [Slice(whole, 0, part * tp_rank, 0, size)] if size > 0 else []


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Smallest multiple of `tp` that holds the vocabulary; the padding never enters a softmax."""
    return -(-vocab_size // tp) * tp


def _qkv(names: tuple[str, ...], model: ModelSpec, tp: int, tp_rank: int) -> list[Slice]:
    """Megatron interleaves by key/value group: the group's query heads, its key head, its value head."""
    q_name, k_name, v_name = names
    d, per_group, groups = model.head_dim, model.num_heads // model.num_kv_heads, model.num_kv_heads // tp
    slices, start = [], 0
    for group in range(groups * tp_rank, groups * (tp_rank + 1)):
        for name, first_head, heads in (
            (q_name, group * per_group, per_group),
            (k_name, group, 1),
            (v_name, group, 1),
        ):
            slices.append(Slice(name, 0, first_head * d, start, heads * d))
            start += heads * d
    return slices
