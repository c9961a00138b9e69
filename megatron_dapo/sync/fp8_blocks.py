"""Weights in block FP8 (weights/block_fp8.py), made where the policy holds them: an element travels as one
byte.

An engine's sink table names a linear layer's weight and its scales as tensors of the checkpoint.
`block_holdings` says which ranks can make which part of them, and BlockWeights makes it:

    linear = linear_weights(hf_shapes(model))
    held = block_holdings(holdings(model, layout), linear)     # for make_plan
    weights = BlockWeights(policy.held_shards(), linear)       # in place of LocalWeights

A block is quantised by one rank, so the policy's slices must begin and end at borders of blocks. Those of
Qwen2.5-32B do at tp 1 to 8, those of models with heads of 64 dimensions do not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_dapo.errors import UserError
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sources import Extent, Held, Holdings, LocalWeights
from megatron_dapo.weights.block_fp8 import BLOCK, SCALES, Shapes, block_scales, quantize
from megatron_dapo.weights.slices import Shard


def block_holdings(held: Holdings, shapes: Shapes) -> Holdings:
    """`held` with the scales of `shapes`. UserError for a slice that begins or ends inside a block."""
    scales: dict[str, tuple[Held, ...]] = {}
    for name, shape in shapes.items():
        for part in held[name]:
            _check_borders(name, shape, part.box)
        scales[name + SCALES] = tuple(Held(_over_blocks(part.box), part.ranks) for part in held[name])
    return {**held, **scales}


def _check_borders(name: str, shape: Extent, box: MappedBox) -> None:
    for dim, (begin, size, extent) in enumerate(zip(box.start, box.size, shape, strict=True)):
        end = begin + size
        if begin % BLOCK or (end % BLOCK and end != extent):
            raise UserError(
                f"a rank of the policy holds {('rows', 'columns')[dim]} {begin} to {end - 1} of {name}, but "
                f"rollout.quantization=fp8_block needs whole blocks of {BLOCK}; choose a "
                f"layout.tensor_parallel that cuts it at multiples of {BLOCK}, or set "
                f"rollout.quantization to null"
            )


def _over_blocks(box: MappedBox) -> MappedBox:
    """The box in blocks instead of elements."""
    start = tuple(begin // BLOCK for begin in box.start)
    ends = (-(-(begin + size) // BLOCK) for begin, size in zip(box.start, box.size, strict=True))
    return MappedBox(start, tuple(end - first for end, first in zip(ends, start, strict=True)))


class BlockWeights(LocalWeights):
    """LocalWeights with those of `shapes` in block FP8, and their scales, made of the bf16 values in every
    view anew.
    """

    def __init__(self, shards: Iterable[Shard], shapes: Shapes) -> None:
        super().__init__(shards)
        self._shapes = shapes

    def view(self, name: str, start: Extent, size: Extent) -> torch.Tensor:
        source = name.removesuffix(SCALES)
        if source not in self._shapes:
            return super().view(name, start, size)
        box = MappedBox(start, size)
        if source != name:
            return block_scales(self._bf16(source, box))
        blocks = _over_blocks(box)
        values, _ = quantize(self._bf16(name, blocks))
        for dim in (0, 1):
            values = values.narrow(dim, start[dim] - blocks.start[dim] * BLOCK, size[dim])
        return values

    def _bf16(self, name: str, blocks: MappedBox) -> torch.Tensor:
        """The elements of these blocks, up to the end of the tensor."""
        start = tuple(first * BLOCK for first in blocks.start)
        size = tuple(
            min(n * BLOCK, extent - low)
            for n, low, extent in zip(blocks.size, start, self._shapes[name], strict=True)
        )
        return super().view(name, start, size).to(torch.bfloat16)
