"""What a checkpoint holds of the optimizer: for every parameter its fp32 weights and AdamW's moments, as
tensors of the parameter's own global shape.

A rank of the distributed optimizer updates a run of elements of its shard, from somewhere within a row to
somewhere within another. Cut into rectangles it is a part of the global tensor as any shard is. So nothing is
gathered to save, no rank writes what another one writes, and any layout reads the parts that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dapo.policy.optimizer import allocate_state, optimizer_parts

NAMES = ("param", "exp_avg", "exp_avg_sq")  # as in Megatron's own checkpoints, `optimizer.state.<name>.<key>`


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The elements of a parameter that this rank updates: from element `start` on, with the flat state of
    each (by NAMES). is_copy: the other data-parallel ranks hold the same.
    """

    parameter: torch.Tensor
    start: int
    states: dict[str, torch.Tensor]
    is_copy: bool


def sharded_optimizer(optimizer: Any, model_state: Any) -> dict[str, ShardedTensor]:
    """This rank's part of the optimizer's state, as views of it: a load puts the values in their place.

    `model_state`: the sharded state dicts of the model's chunks, which hold the parameters themselves.
    """
    allocate_state(optimizer)
    pieces = _pieces(model_state)
    blocks: dict[str, ShardedTensor] = {}
    for run in _runs(optimizer, pieces):
        for piece, first in pieces[run.parameter]:
            for name in NAMES:
                for block in _blocks_of(piece, name, run, run.start - first):
                    blocks[str(len(blocks))] = block
    return blocks


def rectangles(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `end` of a row-major tensor, cut into (offsets, sizes) of rectangles, in order: of
    a matrix at most the rest of a row, whole rows, and the beginning of a row.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    size = math.prod(shape[1:])  # of a row
    row = start // size
    if start % size or end - start < size:
        stop = min(end, (row + 1) * size)
        for offsets, sizes in rectangles(shape[1:], start - row * size, stop - row * size):
            yield (row, *offsets), (1, *sizes)
    else:
        stop = end - end % size
        yield (row, *[0] * (len(shape) - 1)), (stop // size - row, *shape[1:])
    yield from rectangles(shape, stop, end)


def _pieces(model_state: Any) -> dict[torch.Tensor, list[tuple[ShardedTensor, int]]]:
    """For each parameter the tensors of a checkpoint that it is part of, and from which of its elements on:
    Megatron keeps the two halves of a gated layer apart.
    """
    pieces: dict[torch.Tensor, list[tuple[ShardedTensor, int]]] = {}
    for entry in cast("Iterator[Any]", nested_values(model_state)):
        if isinstance(entry, ShardedTensorFactory):
            whole = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
            parts = list(nested_values(replace(entry, data=whole).build()))
            assert all(part.data.is_contiguous() for part in parts), entry.key
            pieces[entry.data] = [(part, part.data.storage_offset()) for part in parts]
        elif isinstance(entry, ShardedTensor):
            pieces[cast("torch.Tensor", entry.data)] = [(entry, 0)]
    return pieces


def _runs(optimizer: Any, parameters: Any) -> Iterator[Run]:
    """All that this rank updates."""
    for part in optimizer_parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            owners = {getattr(parameter, "main_param", parameter): parameter for parameter in parameters}
            for main, state in part.optimizer.state.items():
                states = {"param": main, **state}
                yield Run(parameter=owners[main], start=0, states=states, is_copy=True)
        elif not part.is_stub_optimizer:
            for parameter in part.model_param_group_index_map:
                start = part._get_model_param_range_map(parameter)["param"].start
                states = part._get_main_param_and_optimizer_states(parameter)
                yield Run(parameter=parameter, start=start, states=states, is_copy=False)


def _blocks_of(piece: ShardedTensor, name: str, run: Run, start: int) -> Iterator[ShardedTensor]:
    """The rectangles of `piece` that the run covers. The run begins at element `start` of the piece, before
    it if that is negative.
    """
    flat, shape = run.states[name].detach().view(-1), tuple(piece.local_shape)
    done = max(-start, 0)  # elements of the run
    for offsets, sizes in rectangles(shape, max(start, 0), min(start + len(flat), math.prod(shape))):
        data = flat[done:][: math.prod(sizes)].view((1,) * piece.prepend_axis_num + sizes)
        done += data.numel()
        local = (0,) * piece.prepend_axis_num + offsets
        yield replace(
            piece,
            key=f"optimizer.state.{name}.{piece.key}",
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_offset=tuple(
                base + offset for base, offset in zip(piece.global_offset, local, strict=True)
            ),
            axis_fragmentations=None,  # rectangles of any size
            prepend_axis_num=0,
            # (pipeline, tensor, data) of the copy
            replica_id=piece.replica_id if run.is_copy else (*cast("tuple", piece.replica_id)[:2], 0),
        )
