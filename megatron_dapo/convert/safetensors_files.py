"""Safetensors files by their header: eight bytes of length, JSON with dtype, shape and place of each tensor,
then the values (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.convert.tensors import Block, Stored
from megatron_dapo.errors import UserError
from megatron_dapo.weights.hf import read_weight_map

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ONLY = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor that the folder's index names, or of its only file. UserError names a file that is
    missing, cut short or damaged, and a tensor that is not where the index says.
    """
    if not (folder / "model.safetensors.index.json").is_file() and (only := folder / _ONLY).is_file():
        return read_header(only)
    file_of = read_weight_map(folder)
    in_file = {file: read_header(folder / file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in in_file[file]:
            raise UserError(f"{folder / file} has no tensor {name}, which the index puts there")
    return {name: in_file[file][name] for name, file in file_of.items()}


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file, with their places."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if length > min(_MAX_HEADER, size - 8):
                raise UserError(f"{file} is damaged or cut short: it is no safetensors file")
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: its header is not JSON ({error})") from error
    return {
        name: _stored(file, name, entry, 8 + length, size)
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _stored(file: Path, name: str, entry: Any, begin: int, size: int) -> Stored:
    """`begin`: where values begin in the file. `size`: of the file, bytes."""
    try:
        shape, (start, end) = tuple(map(int, entry["shape"])), entry["data_offsets"]
        kind = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: its header has no place of tensor {name}") from error
    if kind not in DTYPES:
        raise UserError(f"{file}: tensor {name} is {kind}; supported: {', '.join(DTYPES)}")
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(f"{file} is damaged: tensor {name} {list(shape)} {kind} has {end - start} bytes")
    if begin + end > size:
        raise UserError(
            f"{file} is cut short: tensor {name} ends at byte {begin + end}, the file has {size}; fetch it "
            "again"
        )
    shape = shape or (1,)
    block = Block(file, begin + start, shape[0], math.prod(shape[1:]))
    return Stored(shape, DTYPES[kind], (block,))


def header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The first bytes of a file that holds the tensors (name -> shape, dtype) end to end, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
