"""What the trainer says to an engine worker about one chunk of its weights.

Both ends share these types and they are checked wherever they are made, so that nobody reads memory by a
manifest that makes no sense:

    manifest = Manifest(version=3, table=digest, path="/proc/1/fd/5", offset=0, num_bytes=512, ...)
    assert Manifest.from_json(manifest.to_json()) == manifest
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 2  # grows with every change of the fields or of their meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements of one sink of the worker's table, or of a tensor that is sent whole: a box of the Hugging
    Face tensor, row-major, `offset` bytes behind the start of the chunk.
    """

    sink: int | None  # number in SinkTable.sinks; None for a part of a tensor that is sent whole
    source: str | None  # name of that tensor, else None
    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """Of `num_bytes` bytes of the chunk from `offset` on. xxh3: hex digits of xxhash's XXH3, 64 bits."""

    offset: int
    num_bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A chunk of weights that lies ready for one engine worker; one without pieces brings it nothing.
    ValueError names the field that makes no sense.

    version: the weight version that the chunk is a part of. table: digest of the SinkTable that the pieces
    refer to. path: a file that the worker can map. offset, num_bytes: where the chunk lies in it.
    dtype_whole: of tensors that are sent whole, as in torch without "torch."; a sink has the dtype of its
    parameter. checksums: together of every byte of the chunk, in order; () when this push is not verified.
    """

    format: int = FORMAT
    version: int
    table: str
    path: str
    offset: int
    num_bytes: int
    dtype_whole: str
    pieces: tuple[Piece, ...]
    checksums: tuple[Checksum, ...] = ()

    def __post_init__(self) -> None:
        _check_format(self.format)
        for name in ("version", "offset", "num_bytes"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"Manifest.{name}={value!r} must be an integer of at least 0")
        if not isinstance(self.table, str) or not self.table:
            raise ValueError(f"Manifest.table={self.table!r} must be the digest of a sink table")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"Manifest.path={self.path!r} must be the path of a file")
        if not isinstance(getattr(torch, str(self.dtype_whole), None), torch.dtype):
            raise ValueError(f"Manifest.dtype_whole={self.dtype_whole!r} is no dtype of torch")
        for number, piece in enumerate(self.pieces):
            _check_piece(piece, self.num_bytes, f"Manifest.pieces[{number}]")
        self._check_checksums()

    def _check_checksums(self) -> None:
        end = 0
        for number, checksum in enumerate(self.checksums):
            where = f"Manifest.checksums[{number}]"
            if not isinstance(checksum.xxh3, str) or not re.fullmatch("[0-9a-f]{16}", checksum.xxh3):
                raise ValueError(f"{where}.xxh3={checksum.xxh3!r} must be 16 hexadecimal digits")
            if not _is_count(checksum.num_bytes) or not _is_count(checksum.offset) or checksum.offset != end:
                raise ValueError(
                    f"{where}.offset={checksum.offset!r}, num_bytes={checksum.num_bytes!r} must be integers "
                    f"of at least 0 and go on at byte {end}"
                )
            end += checksum.num_bytes
        if self.checksums and end != self.num_bytes:
            raise ValueError(f"Manifest.checksums are of {end} of the chunk's {self.num_bytes} bytes")

    def to_json(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings for `json.dumps`; `from_json` reads them. A piece begins
        with its sink's number or with the name of its tensor.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pieces = [
            [p.source if p.sink is None else p.sink, list(p.start), list(p.size), p.offset]
            for p in self.pieces
        ]
        checksums = [[c.offset, c.num_bytes, c.xxh3] for c in self.checksums]
        return {**fields, "pieces": pieces, "checksums": checksums}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """ValueError names a field that is missing, unknown or wrong."""
        if not isinstance(value, dict):
            raise ValueError(f"Manifest must be an object, got {_short(value)}")
        if "format" in value:
            _check_format(value["format"])  # before the fields, of which another format may have others
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - value.keys()):
            raise ValueError(f"Manifest lacks the field {missing[0]!r}")
        if unknown := sorted(map(str, value.keys() - names)):
            raise ValueError(f"Manifest has the unknown field {unknown[0]!r}")
        pieces = []
        for key, start, size, offset in _rows(value, "pieces", 4):
            by_name = isinstance(key, str)
            pieces.append(
                Piece(
                    sink=None if by_name else key,
                    source=key if by_name else None,
                    start=tuple(start) if isinstance(start, list) else start,
                    size=tuple(size) if isinstance(size, list) else size,
                    offset=offset,
                )
            )
        checksums = [
            Checksum(offset=offset, num_bytes=num_bytes, xxh3=xxh3)
            for offset, num_bytes, xxh3 in _rows(value, "checksums", 3)
        ]
        return cls(**{**value, "pieces": tuple(pieces), "checksums": tuple(checksums)})


def _rows(value: dict[str, Any], name: str, length: int) -> list[list[Any]]:
    """The field `name`, a list of lists of this length."""
    if not isinstance(value[name], list):
        raise ValueError(f"Manifest.{name} must be a list, got {_short(value[name])}")
    for number, row in enumerate(value[name]):
        if not isinstance(row, list) or len(row) != length:
            raise ValueError(f"Manifest.{name}[{number}] must be a list of {length}, got {_short(row)}")
    return value[name]


def _check_format(value: Any) -> None:
    if not _is_count(value) or value != FORMAT:
        raise ValueError(
            f"Manifest.format={value!r} is unknown, this code reads {FORMAT}; trainer and engines need the "
            f"same version of megatron_dapo"
        )


def _check_piece(piece: Piece, num_bytes: int, where: str) -> None:
    if piece.sink is None:
        if not isinstance(piece.source, str) or not piece.source:
            raise ValueError(f"{where}.source={piece.source!r} must be the name of a tensor without a sink")
    elif not _is_count(piece.sink) or piece.source is not None:
        raise ValueError(
            f"{where}.sink={piece.sink!r} must be an integer of at least 0, without a source "
            f"({piece.source!r})"
        )
    if not isinstance(piece.size, tuple) or not all(_is_count(n) and n for n in piece.size):
        raise ValueError(f"{where}.size={piece.size!r} must be integers of at least 1")
    if (
        not isinstance(piece.start, tuple)
        or len(piece.start) != len(piece.size)
        or not all(map(_is_count, piece.start))
    ):
        raise ValueError(
            f"{where}.start={piece.start!r} must be integers of at least 0, one for each dimension of "
            f"size={piece.size!r}"
        )
    if not _is_count(piece.offset) or piece.offset >= num_bytes:
        raise ValueError(f"{where}.offset={piece.offset!r} must lie in the chunk of {num_bytes} bytes")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    return repr(value)[:100]
