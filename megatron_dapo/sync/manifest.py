"""What the trainer says to a receiver about one chunk of weights.

Both ends share this type and it is checked wherever it is made, so that nobody reads memory by a manifest
that makes no sense:

    manifest = Manifest(version=3, path="/proc/1/fd/5", dtype="bf16", entries=(Entry(...), ...))
    assert Manifest.from_json(manifest.to_json()) == manifest
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dapo.weights.hf import DTYPES

FORMAT = 1  # grows with every change of the fields or of their meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One whole Hugging Face tensor, row-major, `offset` bytes behind the start of the memory."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A chunk of weights that lies ready in memory. ValueError names the field that makes no sense.

    version: the weight version that the chunk is a part of. path: a file that the receiver can map.
    dtype: of every tensor, a key of weights.hf.DTYPES.
    """

    format: int = FORMAT
    version: int
    path: str
    dtype: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        _check_format(self.format)
        if not _is_count(self.version):
            raise ValueError(f"Manifest.version={self.version!r} must be an integer of at least 0")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"Manifest.path={self.path!r} must be the path of a file")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"Manifest.dtype={self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        for number, entry in enumerate(self.entries):
            _check_entry(entry, DTYPES[self.dtype].itemsize, f"Manifest.entries[{number}]")
        names = Counter(entry.name for entry in self.entries)
        if repeated := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"Manifest.entries repeat the name {repeated[0]!r}")
        for before, after in itertools.pairwise(sorted(self.entries, key=lambda entry: entry.offset)):
            if after.offset < self._end(before):
                raise ValueError(
                    f"Manifest.entries overlap: {after.name!r} has offset {after.offset}, where "
                    f"{before.name!r} ends only at byte {self._end(before)}"
                )

    @property
    def num_bytes(self) -> int:
        """Bytes from the start of the memory to the end of its last tensor."""
        return max((self._end(entry) for entry in self.entries), default=0)

    def views(self, memory: Any) -> dict[str, torch.Tensor]:
        """The tensors that lie in `memory` (an mmap, or anything else with a buffer), without a copy."""
        dtype = DTYPES[self.dtype]
        return {
            entry.name: torch.frombuffer(
                memory, dtype=dtype, count=math.prod(entry.shape), offset=entry.offset
            ).view(entry.shape)
            for entry in self.entries
        }

    def to_json(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings for `json.dumps`; `from_json` reads them."""
        entries = [{"name": e.name, "shape": list(e.shape), "offset": e.offset} for e in self.entries]
        return {
            "format": self.format,
            "version": self.version,
            "path": self.path,
            "dtype": self.dtype,
            "entries": entries,
        }

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """ValueError names a field that is missing, unknown or wrong."""
        if isinstance(value, dict) and "format" in value:
            _check_format(value["format"])  # before the fields, of which another format may have others
        fields = _checked_fields(value, cls, "Manifest")
        if not isinstance(fields["entries"], list):
            raise ValueError(f"Manifest.entries must be a list, got {_short(fields['entries'])}")
        entries = []
        for number, row in enumerate(fields["entries"]):
            where = f"Manifest.entries[{number}]"
            row = _checked_fields(row, Entry, where)
            if not isinstance(row["shape"], list):
                raise ValueError(f"{where}.shape must be a list, got {_short(row['shape'])}")
            entries.append(Entry(name=row["name"], shape=tuple(row["shape"]), offset=row["offset"]))
        return cls(**{**fields, "entries": tuple(entries)})

    def _end(self, entry: Entry) -> int:
        return entry.offset + math.prod(entry.shape) * DTYPES[self.dtype].itemsize


def _check_format(value: Any) -> None:
    if not _is_count(value) or value != FORMAT:
        raise ValueError(
            f"Manifest.format={value!r} is unknown, this code reads {FORMAT}; trainer and engines need the "
            f"same version of megatron_dapo"
        )


def _check_entry(entry: Entry, item_size: int, where: str) -> None:
    if not isinstance(entry.name, str) or not entry.name:
        raise ValueError(f"{where}.name={entry.name!r} must be the name of a tensor")
    if not isinstance(entry.shape, tuple) or not all(_is_count(size) and size for size in entry.shape):
        raise ValueError(f"{where}.shape={entry.shape!r} of {entry.name!r} must be integers of at least 1")
    if not _is_count(entry.offset) or entry.offset % item_size:
        raise ValueError(
            f"{where}.offset={entry.offset!r} of {entry.name!r} must be an integer of at least 0 and a "
            f"multiple of the {item_size} bytes of an element"
        )


def _checked_fields(value: Any, kind: type, where: str) -> dict[str, Any]:
    """`value`, a JSON object with exactly the fields of the dataclass `kind`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    names = {field.name for field in dataclasses.fields(kind)}
    if missing := sorted(names - value.keys()):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    if unknown := sorted(map(str, value.keys() - names)):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    return repr(value)[:100]
