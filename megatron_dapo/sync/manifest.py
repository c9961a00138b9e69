"""What the trainer says to an engine worker about one chunk of its weights.

Both ends share these types and they are checked wherever they are made, so that nobody reads memory by a
manifest that makes no sense:

    manifest = Manifest(version=3, table=digest, path="/proc/1/fd/5", offset=0, num_bytes=512, ...)
    assert Manifest.from_json(manifest.to_json()) == manifest

What a chunk consists of is the same in every push of a plan, and by far the longest part of a manifest. It is
told once; `manifest.brief()` only names it by its digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 3  # grows with every change of the fields or of their meaning


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
    refer to. path: memory that the worker can open (sync/staging_memory.py, sync/device_memory.py). offset,
    num_bytes: where the chunk lies in it. dtype_whole: of tensors that are sent whole, as in torch without
    "torch."; a sink has the dtype of its parameter. pieces: of the chunk; None when the worker has been told
    them in an earlier push. digest: of the pieces; "" has them checked and it computed. checksums: together
    of every byte of the chunk, in order; () when this push is not verified.
    """

    format: int = FORMAT
    version: int
    table: str
    path: str
    offset: int
    num_bytes: int
    dtype_whole: str
    pieces: tuple[Piece, ...] | None
    digest: str = ""
    checksums: tuple[Checksum, ...] = ()

    def __post_init__(self) -> None:
        _check_format(self.format)
        for name in ("version", "offset", "num_bytes"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"Manifest.{name}={value!r} must be an integer of at least 0")
        if not isinstance(self.table, str) or not self.table:
            raise ValueError(f"Manifest.table={self.table!r} must be the digest of a sink table")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"Manifest.path={self.path!r} must name memory of this host")
        if not isinstance(getattr(torch, str(self.dtype_whole), None), torch.dtype):
            raise ValueError(f"Manifest.dtype_whole={self.dtype_whole!r} is no dtype of torch")
        if not self.digest and self.pieces is not None:
            for number, piece in enumerate(self.pieces):
                _check_piece(piece, self.num_bytes, f"Manifest.pieces[{number}]")
            object.__setattr__(self, "digest", _digest(self.pieces))
        if not isinstance(self.digest, str) or not re.fullmatch("[0-9a-f]{64}", self.digest):
            raise ValueError(f"Manifest.digest={_short(self.digest)} must be 64 hexadecimal digits")
        self._check_checksums()

    def brief(self) -> Manifest:
        """The same for a worker that knows the pieces."""
        return dataclasses.replace(self, pieces=None)

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
        pieces = None if self.pieces is None else _piece_rows(self.pieces)
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
        checksums = [
            Checksum(offset=offset, num_bytes=num_bytes, xxh3=xxh3)
            for offset, num_bytes, xxh3 in _rows(value, "checksums", 3)
        ]
        if value["pieces"] is None:
            return cls(**{**value, "checksums": tuple(checksums)})
        pieces = tuple(_piece(*row) for row in _rows(value, "pieces", 4))
        manifest = cls(**{**value, "pieces": pieces, "digest": "", "checksums": tuple(checksums)})
        if manifest.digest != value["digest"]:
            raise ValueError(f"Manifest.digest={_short(value['digest'])} is not that of its pieces")
        return manifest


def _piece_rows(pieces: tuple[Piece, ...]) -> list[list[Any]]:
    return [[p.source if p.sink is None else p.sink, list(p.start), list(p.size), p.offset] for p in pieces]


def _piece(key: Any, start: Any, size: Any, offset: Any) -> Piece:
    """Of one row."""
    by_name = isinstance(key, str)
    return Piece(
        sink=None if by_name else key,
        source=key if by_name else None,
        start=tuple(start) if isinstance(start, list) else start,
        size=tuple(size) if isinstance(size, list) else size,
        offset=offset,
    )


def _digest(pieces: tuple[Piece, ...]) -> str:
    """SHA-256 of the pieces in their order."""
    return hashlib.sha256(json.dumps(_piece_rows(pieces), separators=(",", ":")).encode()).hexdigest()


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
