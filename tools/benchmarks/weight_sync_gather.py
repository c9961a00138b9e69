"""The full gather, as a baseline of weight pushes: a bucket of tensors after the other becomes whole on every
rank, which hands it to its worker, whose loaders take their part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.sync.exchange import Exchange
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.publish import Publisher, Shapes
from megatron_dapo.sync.regions import MappedBox
from megatron_dapo.sync.sources import Extent, Held, Holdings, LocalWeights
from megatron_dapo.sync.staging import Means
from megatron_dapo.weights.slices import Shard


class GatheredWeights(LocalWeights):
    """Of tensors, gathered from the ranks that hold their parts, all elements on every rank."""

    def __init__(self, shards: Sequence[Shard], places: Holdings, shapes: Shapes, means: Means) -> None:
        super().__init__(shards)
        self._places, self._shapes, self._means = places, shapes, means
        self._whole: dict[str, torch.Tensor] = {}
        self._dtype = shards[0].tensor.dtype

    def gather(self, names: Collection[str]) -> None:
        """These, and no others any more. Collective."""
        self._whole = {name: self._whole[name] if name in self._whole else self._made(name) for name in names}

    def view(self, name: str, start: Extent, size: Extent) -> torch.Tensor:
        return _box(self._whole[name], start, size)

    def _made(self, name: str) -> torch.Tensor:
        parts = self._places[name]
        if len(parts) == 1 and len(parts[0].ranks) == dist.get_world_size(self._means.control):
            return super().view(name, parts[0].box.start, parts[0].box.size)  # nobody has to send it
        whole = torch.empty(self._shapes[name], dtype=self._dtype)
        for part in parts:
            if self._means.rank == part.ranks[0]:
                values = super().view(name, part.box.start, part.box.size).contiguous()
            else:
                values = torch.empty(part.box.size, dtype=self._dtype)
            dist.broadcast(values, group=self._means.control, group_src=part.ranks[0])
            _box(whole, part.box.start, part.box.size).copy_(values)
        return whole


class GatheringExchange(Exchange):
    """Every rank sends what it has gathered, to the worker that it carries."""

    def set_workers(self, workers: Sequence[Worker]) -> None:
        super().set_workers(workers)
        staging: Any = self._staging
        fill = staging.fill

        def gather_and_fill(number: int, of: Any, weights: GatheredWeights, verify: bool) -> Any:
            messages = staging.plan.rounds[number]
            copies = (copy for message in messages for copy in message.parcel.copies)
            weights.gather(dict.fromkeys(copy.sink.source for copy in copies))
            return fill(number, of, weights, verify)

        staging.fill = gather_and_fill


def gathering(publisher: Publisher, places: Holdings, shapes: Shapes) -> Publisher:
    """One that is like this one, and gathers."""
    ours: Any = publisher._transport
    means, ranks = ours._means, tuple(range(len(ours._hosts)))
    whole = {n: (Held(MappedBox((0,) * len(size), tuple(size)), ranks),) for n, size in shapes.items()}
    exchange = GatheringExchange(
        means, hosts=ours._hosts, held=whole, chunk_bytes=ours._chunk_bytes, dtype=ours._dtype
    )
    return Publisher(
        exchange,
        publisher._share,
        shapes=shapes,
        dtype=ours._dtype,
        weights=lambda shards: GatheredWeights(shards, places, shapes, means),
    )


def _box(tensor: torch.Tensor, start: Extent, size: Extent) -> torch.Tensor:
    for dim, (first, extent) in enumerate(zip(start, size, strict=True)):
        tensor = tensor.narrow(dim, first, extent)
    return tensor
