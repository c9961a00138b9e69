"""Sink tables: for every element of an engine worker's parameters, which element of which Hugging Face tensor
belongs there.

A worker's table is recorded from vLLM's own loaders (sync/vllm/sinks_recorder.py), travels as JSON, is
checked by sync/sink_checks.py and replayed by `fill`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dapo.sync.regions import Region

FORMAT = 1  # grows with every change of the fields or of their meaning
RANKS = ("tp", "tp_rank", "pp", "pp_rank", "ep", "ep_rank")
FIELDS = {"format", "ranks", "parameters", "sources", "sinks", "padding", "whole", "computed"}  # of the JSON


@dataclass(frozen=True, slots=True, order=True)
class Sink:
    """Elements of one engine parameter and where they come from: with p the parameter's storage,
    p.as_strided(size, stride, offset) is source[start : start + size] (in every dimension).
    """

    parameter: str  # vLLM's name
    source: str  # Hugging Face name
    start: tuple[int, ...]  # corner of the box in the Hugging Face tensor
    size: tuple[int, ...]  # its extent
    offset: int  # elements, in the parameter's storage
    stride: tuple[int, ...]  # elements, of the parameter's storage, by dimension of the Hugging Face tensor

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)

    @property
    def region(self) -> Region:
        """Of the parameter's storage."""
        return Region(self.offset, self.size, self.stride)

    def part(self, start: tuple[int, ...], size: tuple[int, ...]) -> Sink:
        """The box [start, start + size) of the Hugging Face tensor, which must lie inside this one."""
        if (start, size) == (self.start, self.size):
            return self
        for low, extent, first, n in zip(self.start, self.size, start, size, strict=True):
            if n < 1 or first < low or first + n > low + extent:
                raise ValueError(
                    f"{self.source}[{start} + {size}] is no part of the sink's box {self.start} + {self.size}"
                )
        moved = sum((new - old) * step for new, old, step in zip(start, self.start, self.stride, strict=True))
        return dataclasses.replace(self, start=start, size=size, offset=self.offset + moved)


@dataclass(frozen=True, slots=True, order=True)
class Padding:
    """Elements of one engine parameter that hold a constant, as rows that fill up the vocabulary do."""

    parameter: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    value: float

    @property
    def region(self) -> Region:
        """Of the parameter's storage."""
        return Region(self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class SinkTable:
    """What one engine worker needs. ValueError names the field that makes no sense.

    shapes: of every parameter, outermost dimension of its storage first (other than the parameter's own shape
    only for one that is kept transposed). dtypes: of every parameter, as in torch without "torch.".
    whole: Hugging Face tensors that a loader computes with: sent whole and loaded by the real loader.
    computed: the parameters that it fills from them, each with the operation that no copy can replay; no sink
    writes to these.
    """

    sinks: tuple[Sink, ...]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    whole: tuple[str, ...] = ()
    padding: tuple[Padding, ...] = ()
    computed: Mapping[str, str] = field(default_factory=dict)
    tp: int = 1
    tp_rank: int = 0
    pp: int = 1
    pp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check_format(self.format)
        for kind in ("tp", "pp", "ep"):
            size, rank = getattr(self, kind), getattr(self, f"{kind}_rank")
            if not (_is_count(size) and _is_count(rank) and rank < size):
                raise ValueError(f"SinkTable.{kind}_rank={rank!r} must be a rank of {kind}={size!r}")
        if self.dtypes.keys() != self.shapes.keys():
            name = min(self.dtypes.keys() ^ self.shapes.keys())
            raise ValueError(f"SinkTable.dtypes and SinkTable.shapes differ: only one of them has {name!r}")
        for name, dtype in self.dtypes.items():
            if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                raise ValueError(f"SinkTable.dtypes[{name!r}]={dtype!r} is no dtype of torch")
        for number, sink in enumerate(self.sinks):
            _check_region(sink, self.dtypes, f"SinkTable.sinks[{number}]")
            if len(sink.start) != len(sink.size) or not all(map(_is_count, sink.start)):
                raise ValueError(
                    f"SinkTable.sinks[{number}].start={sink.start!r} must be one integer of at least 0 for "
                    f"each of the {len(sink.size)} dimensions of its size"
                )
        for number, padding in enumerate(self.padding):
            _check_region(padding, self.dtypes, f"SinkTable.padding[{number}]")

    @property
    def num_elements(self) -> int:
        """Of all sinks: what a worker receives, without padding and tensors sent whole."""
        return sum(sink.num_elements for sink in self.sinks)

    @property
    def num_bytes(self) -> int:
        """`num_elements` in the dtypes of the parameters."""
        return sum(
            sink.num_elements * getattr(torch, self.dtypes[sink.parameter]).itemsize for sink in self.sinks
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the table, whatever the order of its rows: equal tables have equal digests."""
        table = dataclasses.replace(
            self,
            sinks=tuple(sorted(self.sinks)),
            padding=tuple(sorted(self.padding)),
            dtypes=dict(sorted(self.dtypes.items())),
            whole=tuple(sorted(self.whole)),
        )
        text = json.dumps(table.to_json(), separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Lists, numbers and strings for `json.dumps`; rows name parameters and sources by number."""
        parameters = {name: number for number, name in enumerate(self.dtypes)}
        sources = {name: number for number, name in enumerate(dict.fromkeys(s.source for s in self.sinks))}
        return {
            "format": self.format,
            "ranks": [getattr(self, name) for name in RANKS],
            "parameters": [[name, dtype, list(self.shapes[name])] for name, dtype in self.dtypes.items()],
            "sources": list(sources),
            "sinks": [
                [
                    parameters[s.parameter],
                    sources[s.source],
                    list(s.start),
                    list(s.size),
                    s.offset,
                    list(s.stride),
                ]
                for s in self.sinks
            ],
            "padding": [
                [parameters[p.parameter], p.offset, list(p.size), list(p.stride), p.value]
                for p in self.padding
            ],
            "whole": list(self.whole),
            "computed": dict(self.computed),
        }

    @classmethod
    def from_json(cls, value: Any) -> SinkTable:
        """ValueError names a field or a row that is missing, unknown or wrong."""
        if not isinstance(value, dict):
            raise ValueError(f"SinkTable must be an object, got {repr(value)[:100]}")
        _check_format(value.get("format"))  # before the fields, of which another format may have others
        if value.keys() != FIELDS:
            raise ValueError(f"SinkTable has the fields {sorted(value)} instead of {sorted(FIELDS)}")
        try:
            names = {number: name for number, (name, _, _) in enumerate(value["parameters"])}
            sources = dict(enumerate(value["sources"]))
            return cls(
                sinks=tuple(
                    Sink(names[p], sources[s], tuple(start), tuple(size), offset, tuple(stride))
                    for p, s, start, size, offset, stride in value["sinks"]
                ),
                dtypes={name: dtype for name, dtype, _ in value["parameters"]},
                shapes={name: tuple(shape) for name, _, shape in value["parameters"]},
                whole=tuple(value["whole"]),
                padding=tuple(
                    Padding(names[p], offset, tuple(size), tuple(stride), number)
                    for p, offset, size, stride, number in value["padding"]
                ),
                computed=dict(value["computed"]),
                **dict(zip(RANKS, value["ranks"], strict=True)),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"SinkTable has a row that cannot be read: {error!r}") from error


def fill(
    table: SinkTable, parameters: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]
) -> None:
    """Write all sinks and all padding of `table` into `parameters`, from whole Hugging Face tensors.

    KeyError for a parameter or a source that is not there.
    """
    with torch.no_grad():
        for padding in table.padding:
            _region(parameters, padding).fill_(padding.value)
        for sink in table.sinks:
            box = tuple(slice(low, low + n) for low, n in zip(sink.start, sink.size, strict=True))
            _region(parameters, sink).copy_(sources[sink.source][box])


def _region(parameters: Mapping[str, torch.Tensor], row: Sink | Padding) -> torch.Tensor:
    return parameters[row.parameter].data.as_strided(row.size, row.stride, row.offset)


def _check_format(value: Any) -> None:
    if not _is_count(value) or value != FORMAT:
        raise ValueError(
            f"SinkTable.format={value!r} is unknown, this code reads {FORMAT}; trainer and engines need the "
            f"same version of megatron_dapo"
        )


def _check_region(row: Sink | Padding, parameters: Mapping[str, Any], where: str) -> None:
    if row.parameter not in parameters:
        raise ValueError(f"{where}.parameter={row.parameter!r} is not among the table's parameters")
    if not all(_is_count(n) and n for n in row.size):
        raise ValueError(f"{where}.size={row.size!r} must be integers of at least 1")
    if len(row.stride) != len(row.size) or not all(map(_is_count, row.stride)) or not _is_count(row.offset):
        raise ValueError(
            f"{where}: offset={row.offset!r} and stride={row.stride!r} must be integers of at least 0, one "
            f"stride for each dimension of size={row.size!r}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
