"""Which policy ranks hold which part of each Hugging Face tensor, from the layout alone, and where it lies in
a rank's own parameters. Pure arithmetic: no model is built and no process group is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.weights.names import ROWS, Row, hf_shapes
from megatron_dapo.weights.slices import Shard, Slice, slices_of

Extent = tuple[int, ...]  # a corner, or a size, by dimension


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a Hugging Face tensor, and the ranks that hold it, all with the same values."""

    box: MappedBox
    ranks: tuple[int, ...]


Holdings = Mapping[str, tuple[Held, ...]]  # by name of the Hugging Face tensor; its parts are disjoint


def holdings(model: ModelSpec, layout: Layout) -> Holdings:
    """Every part of the checkpoint and its holders: data- and context-parallel replicas, all tensor-parallel
    ranks of what they do not split, and the first and the last stage of tied embeddings.

    Together the parts of a tensor are the whole of it.
    """
    shapes, ranks = hf_shapes(model), _ranks_by_part(layout)
    found: dict[str, dict[MappedBox, list[int]]] = {name: {} for name in shapes}
    for row in ROWS:
        if row.needs is not None and not getattr(model, row.needs):
            continue
        parts = layout.etp if row.expert else layout.tp
        for name, stages, ep in _copies(row, model, layout):
            for part in range(parts):
                holders = [rank for stage in stages for rank in ranks[row.expert, part, ep, stage]]
                for piece in slices_of(name, model, tp=parts, tp_rank=part):
                    box = _box(piece, shapes[piece.hf])
                    found[piece.hf].setdefault(box, []).extend(holders)
    return {
        name: tuple(Held(box, tuple(sorted(holders))) for box, holders in boxes.items())
        for name, boxes in found.items()
    }


class LocalWeights:
    """The parameters of one rank, addressed by Hugging Face name and box.

    `shards`: everything that the rank holds, also what other ranks hold too.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._parts: dict[str, list[tuple[Slice, torch.Tensor]]] = {}
        for shard in shards:
            for piece in shard.slices:
                self._parts.setdefault(piece.hf, []).append((piece, shard.tensor))

    def view(self, name: str, start: Extent, size: Extent) -> torch.Tensor:
        """The elements of `name` in the box, as a view of the rank's parameter, of shape `size`.

        LookupError if the rank does not hold all of them in one piece.
        """
        for piece, tensor in self._parts.get(name, ()):
            offset = start[piece.dim] - piece.hf_start
            if offset >= 0 and offset + size[piece.dim] <= piece.size:
                for dim, (first, extent) in enumerate(zip(start, size, strict=True)):
                    tensor = tensor.narrow(dim, piece.start + offset if dim == piece.dim else first, extent)
                return tensor
        raise LookupError(f"this rank does not hold {name}[{start} + {size}]")


def _copies(row: Row, model: ModelSpec, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(Megatron name, pipeline stages that have it, expert-parallel rank) of every parameter of the row."""
    [name, *_] = row.megatron
    last = layout.pp - 1
    if not name.startswith("decoder.layers."):
        embedding = name.startswith("embedding.")
        stages = {0, last} if embedding and model.tied else {0} if embedding else {last}
        yield name, tuple(sorted(stages)), 0
        return
    layers_a_chunk = model.num_layers // layout.num_stages
    experts_a_rank = model.num_experts // layout.ep
    for i in range(model.num_layers):
        stage = i // layers_a_chunk % layout.pp  # an interleaved pipeline deals its chunks out in turn
        for e in range(model.num_experts if row.expert else 1):
            yield name.format(i=i, e=e), (stage,), e // experts_a_rank if row.expert else 0


def _ranks_by_part(layout: Layout) -> dict[tuple[bool, int, int, int], list[int]]:
    """Ranks by (of an expert?, tensor-parallel part, expert-parallel part, pipeline stage). Megatron orders
    the ranks of a stage by expert-tensor, then expert parallelism, where experts are concerned.
    """
    found: dict[tuple[bool, int, int, int], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        rest, etp = divmod(rank % (layout.world_size // layout.pp), layout.etp)
        found.setdefault((False, at.tp, 0, at.pp), []).append(rank)
        found.setdefault((True, etp, rest % layout.ep, at.pp), []).append(rank)
    return found


def _box(piece: Slice, shape: Extent) -> MappedBox:
    return MappedBox(
        tuple(piece.hf_start if dim == piece.dim else 0 for dim in range(len(shape))),
        tuple(piece.size if dim == piece.dim else extent for dim, extent in enumerate(shape)),
    )
