"""What every way of moving weights from the policy's ranks to the engines has in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.weights.slices import Shard


class Transport(Protocol):
    """Puts the weights, chunk by chunk, where the engines can take them from."""

    def chunks(self, shards: Sequence[Shard], version: int) -> Iterator[Manifest]:
        """One manifest per chunk, ready to be sent. `shards` is what this rank contributes.

        Collective: every rank walks through all chunks, whether or not it sends the manifests. A chunk may be
        overwritten as soon as the next one is asked for, so the engines must have answered by then.
        """
        ...
