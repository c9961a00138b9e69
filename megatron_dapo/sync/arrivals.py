"""What an engine worker has received of a weight update: every element of every sink once, no more and no
less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megatron_dapo.sync.manifest import Piece
from megatron_dapo.sync.regions import MappedBox, row_major, without
from megatron_dapo.sync.sinks import Sink, SinkTable


class Arrivals:
    """Of one update. shapes: of the tensors that the table names `whole`."""

    def __init__(self, table: SinkTable, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sinks: dict[int | str | None, Sink] = dict(enumerate(table.sinks))
        for name in table.whole:
            shape = shapes[name]
            self._sinks[name] = Sink(name, name, (0,) * len(shape), shape, 0, row_major(shape))
        self._left = {key: [MappedBox(sink.start, sink.size)] for key, sink in self._sinks.items()}

    def take(self, piece: Piece) -> Sink:
        """Note that `piece` has arrived. Returned is the part of the sink that it is; for a part of a whole
        tensor that of a sink with its name, as if the tensor were a parameter.

        ValueError for a piece of no sink, or one with elements that have arrived before.
        """
        key = piece.source if piece.sink is None else piece.sink
        if (sink := self._sinks.get(key)) is None:
            raise ValueError(f"a piece is of {key!r}, which is no sink of this worker's table")
        part = sink.part(piece.start, piece.size)
        box = MappedBox(piece.start, piece.size)
        left = [] if self._left[key] == [box] else without(self._left[key], box)
        if _count(self._left[key]) - _count(left) != box.num_elements:
            raise ValueError(f"{sink.source}[{piece.start} + {piece.size}] for {sink.parameter} came twice")
        self._left[key] = left
        return part

    def is_complete(self, key: int | str) -> bool:
        return not self._left[key]

    def missing(self) -> list[str]:
        """One line for every parameter, and for every tensor that is sent whole, that is not complete."""
        expected, left = Counter[str](), Counter[str]()
        for key, sink in self._sinks.items():
            expected[sink.parameter] += sink.num_elements
            left[sink.parameter] += _count(self._left[key])
        return [
            f"{name} got {expected[name] - number} of {expected[name]} elements"
            for name, number in left.items()
            if number
        ]


def _count(boxes: list[MappedBox]) -> int:
    return sum(box.num_elements for box in boxes)
