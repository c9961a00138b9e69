"""What torch.save writes, read without running what a pickle asks for: plain values, and where each tensor's
values lie. Unknown classes become empty stand-ins, so neither Megatron nor TransformerEngine is needed.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.errors import UserError

_CHECK_BYTES = 1 << 20  # small enough for a processor's cache
# Globals of pickles that are taken as they are: containers, and what torch's checkpoint metadata is made of.
_PLAIN = {
    "argparse": {"Namespace"},
    "builtins": {
        "set",
        "frozenset",
        "slice",
        "range",
        "complex",
        "bytearray",
        "int",
        "float",
        "list",
        "dict",
    },
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "types": {"SimpleNamespace"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
}
# the classes by which torch.save tells the types of values
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a file: `start` is the first byte of its values in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool
    start: int


class Unknown:
    """Stands for an object of a class that is not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Unknown:
        return Unknown()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def read_pickle(file: Path) -> Any:
    """A plain pickle, such as the .metadata of a distributed checkpoint. UserError when it is none."""
    try:
        with open(file, "rb") as stream:
            return _Unpickler(stream, None).load()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}; save it again") from error


def read_torch_file(file: Path) -> Any:
    """What torch.save wrote, with a SavedTensor for each tensor. UserError for anything else."""
    try:
        with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
            return _Unpickler(io.BytesIO(archive.read(_members(archive)["data.pkl"])), archive).load()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{file} is cut short, damaged or of a torch before 1.6 ({error}); save it again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}; save it again") from error


def data_start(descriptor: int, file: Path, name: str, offset: int, length: int, num_bytes: int) -> int:
    """First byte in the file of the values of a tensor that torch.save wrote at [offset, offset + length).

    UserError when there are not `num_bytes` of them, or when their checksum is wrong.
    """
    try:
        with zipfile.ZipFile(_Part(descriptor, offset, length)) as archive:
            member = _members(archive)["data/0"]
            start = offset + _start_in(archive, member)
    except (zipfile.BadZipFile, KeyError, struct.error) as error:
        raise UserError(
            f"{file} is damaged or cut short at tensor {name} (bytes {offset} to {offset + length}): {error}"
        ) from error
    if member.file_size != num_bytes:
        raise UserError(
            f"{file}: tensor {name} has {member.file_size} bytes, not the {num_bytes} that .metadata says"
        )
    if _crc32(descriptor, start, num_bytes) != member.CRC:
        raise UserError(f"{file} is damaged: the checksum of tensor {name} is wrong; copy or save it again")
    return start


def _crc32(descriptor: int, start: int, num_bytes: int) -> int:
    buffer, crc, end = memoryview(bytearray(_CHECK_BYTES)), 0, start + num_bytes
    while start < end and (count := os.preadv(descriptor, [buffer[: end - start]], start)):
        crc, start = zlib.crc32(buffer[:count], crc), start + count
    return crc


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Records by their names behind the archive's own folder."""
    return {member.filename.split("/", 1)[-1]: member for member in archive.infolist()}


def _start_in(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored record begin: behind its local header of 30 bytes, name and extra field."""
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    header = archive.fp.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no local header")
    name, extra = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name + extra


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise zipfile.BadZipFile("too short")
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        found = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._at)
        self._at += len(found)
        return found


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and SavedTensors; an archive is needed for the latter."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile | None) -> None:
        super().__init__(stream)
        self._archive = archive
        self._members = _members(archive) if archive else {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return self._tensor if name == "_rebuild_tensor_v2" else self._parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Unknown,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        """('storage', class, key, location, elements) -> (dtype, key)."""
        _, dtype, key, *_ = pid
        return dtype, key

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> SavedTensor:
        assert self._archive is not None, "a tensor in a plain pickle"
        dtype, key = storage
        start = _start_in(self._archive, self._members[f"data/{key}"])
        whole = torch.empty(shape, device="meta", dtype=dtype)
        contiguous = tuple(stride) == whole.stride() or whole.numel() <= 1
        return SavedTensor(tuple(shape), dtype, contiguous, start + offset * dtype.itemsize)

    @staticmethod
    def _parameter(tensor: Any, *_: Any) -> Any:
        return tensor
