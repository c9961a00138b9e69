"""What every way of moving weights from the policy's ranks to the engines has in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from megatron_dapo.sync.manifest import Manifest
from megatron_dapo.sync.plan import Worker
from megatron_dapo.sync.sources import LocalWeights


class Transport(Protocol):
    """Puts the weights, round by round, where the engines can take them from. Its methods are collective."""

    @property
    def lost(self) -> Mapping[str, str]:
        """The engines of this push whose host was lost, and why; every rank knows when a round is there."""
        ...

    def set_workers(self, workers: Sequence[Worker]) -> None:
        """The workers of all engines from now on, the same on every rank. Nothing happens when they are the
        ones from before. When rank 0 calls this the engines have answered every round of the last push.
        """
        ...

    def rounds(
        self, weights: LocalWeights, version: int, *, engines: Collection[str], verify: bool
    ) -> Iterator[Mapping[str, list[Manifest]]]:
        """One item per round: on rank 0 for each of `engines` that is not `lost` what its workers read, by
        Worker.rank; nothing on the other ranks. `weights`: the parameters of this rank. `verify`: with
        checksums.

        Every rank walks through all rounds, with the same `engines`. Two rounds lie ready at a time: when
        rank 0 asks for another one, the engines must have answered the one before the last; when it begins
        another push, all.
        """
        ...
