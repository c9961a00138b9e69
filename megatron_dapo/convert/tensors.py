"""Tensors as they lie in files: which bytes of which file are which rows and columns. A conversion between
checkpoint formats relabels these places; only then are values read, a few rows at a time.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_dapo.convert.torch_files import data_start
from megatron_dapo.errors import UserError

PIECE_BYTES = 2 << 20  # of values that are read at once: they stay in a processor's cache
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that torch.save wrote somewhere in a file: `length` bytes from `offset` on, `num_bytes` of
    them its values.
    """

    offset: int
    length: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """A matrix [rows, columns] whose rows lie end to end in a file, at [at_row, at_column] of a tensor.

    start: its first byte in the file or, with `item`, in the values of the item.
    """

    file: Path
    start: int
    rows: int
    columns: int
    at_row: int = 0
    at_column: int = 0
    item: Item | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of one or more dimensions and the blocks of files that hold it. All dimensions behind the
    first count as columns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def covered(self) -> bool:
        """Whether the blocks lie inside the tensor and have as many elements as it has."""
        inside = all(
            b.at_row + b.rows <= self.shape[0] and b.at_column + b.columns <= self.columns
            for b in self.blocks
        )
        return inside and sum(b.rows * b.columns for b in self.blocks) == math.prod(self.shape)

    def rows(self, start: int, size: int) -> Iterator[Block]:
        """The parts of the blocks in rows [start, start + size); at_row counts from `start`."""
        for block in self.blocks:
            first, end = max(start, block.at_row), min(start + size, block.at_row + block.rows)
            if first < end:
                skipped = (first - block.at_row) * block.columns * self.dtype.itemsize
                yield replace(block, start=block.start + skipped, rows=end - first, at_row=first - start)


def stacked(parts: Sequence[tuple[Stored, int, int]]) -> Stored:
    """Rows (start, size) of several tensors of one type and width, one below the other."""
    blocks, end = [], 0
    for tensor, start, size in parts:
        blocks += [replace(block, at_row=block.at_row + end) for block in tensor.rows(start, size)]
        end += size
    first = parts[0][0]
    return Stored((end, *first.shape[1:]), first.dtype, tuple(blocks))


class Reader:
    """Reads rows of stored tensors. Keeps a number of files open."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._starts: dict[tuple[Path, int], int] = {}  # first byte of the values, by file and item

    def read(self, name: str, tensor: Stored, start: int, size: int) -> torch.Tensor:
        """Rows [start, start + size). UserError names the file and the tensor when the bytes are not there
        or their checksum is wrong.
        """
        rows = torch.empty(size, tensor.columns, dtype=tensor.dtype)
        for block in tensor.rows(start, size):
            target = rows[block.at_row : block.at_row + block.rows]
            if block.columns == tensor.columns:
                self._fill(name, block, target)
            else:
                part = torch.empty(block.rows, block.columns, dtype=tensor.dtype)
                self._fill(name, block, part)
                target[:, block.at_column : block.at_column + block.columns] = part
        return rows.view(size, *tensor.shape[1:])

    def pieces(self, name: str, tensor: Stored, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The whole tensor from its first row to its last, at most `piece_bytes` (or one row) at a time."""
        step = max(1, piece_bytes // max(1, tensor.row_bytes))
        for start in range(0, tensor.shape[0], step):
            yield self.read(name, tensor, start, min(step, tensor.shape[0] - start))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _fill(self, name: str, block: Block, target: torch.Tensor) -> None:
        file, start = self._open(block.file), block.start
        if block.item is not None:
            key = (block.file, block.item.offset)
            if key not in self._starts:
                item = block.item
                self._starts[key] = data_start(
                    file, block.file, name, item.offset, item.length, item.num_bytes
                )
            start += self._starts[key]
        view = memoryview(target.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
        while view:
            count = os.preadv(file, [view], start)
            if count == 0:
                raise UserError(f"{block.file} is cut short inside tensor {name}; fetch or save it again")
            view, start = view[count:], start + count

    def _open(self, file: Path) -> int:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[file] = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        return self._files[file]
