"""The two formats that are written: a Hugging Face folder of safetensors files, and Megatron's distributed
checkpoint as its own training loads it at any layout. Files are written from front to back, whoever writes
them in whatever order; a record of each says what the last step needs.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dapo.convert.disk_keys import Target, extra_states
from megatron_dapo.convert.mapping import as_hf, as_megatron
from megatron_dapo.convert.safetensors_files import header
from megatron_dapo.convert.tensors import Stored
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.weights import hf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RELEASE = "release"  # Megatron-LM's name for weights without a training state
Record = dict[str, Any]  # what JSON can say about a finished file
Pieces = Callable[[str], Iterator[torch.Tensor]]


class Stream(Protocol):
    def write(self, data: Any, /) -> int: ...

    def tell(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: where its values come from, and as what type they go."""

    source: Stored
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes // self.source.dtype.itemsize * self.dtype.itemsize


class Output(Protocol):
    """A format. `entries`: the tensors in the order in which they are cut into files."""

    entries: Mapping[str, Entry]
    subfolder: str  # of the checkpoint, where the files lie

    def file_name(self, number: int, total: int) -> str: ...

    def write(self, stream: Stream, names: Sequence[str], pieces: Pieces) -> Record: ...

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None: ...


def _entry(name: str, tensor: Stored, dtype: str | None) -> Entry:
    if tensor.dtype not in _DTYPE_NAMES:
        raise UserError(
            f"{tensor.blocks[0].file}: tensor {name} is {tensor.dtype}; only {', '.join(DTYPES)} are "
            "converted: dequantise it first"
        )
    return Entry(tensor, DTYPES[dtype] if dtype else tensor.dtype)


class HfOutput:
    """Safetensors files with an index, and the other files of `source`, a Hugging Face folder."""

    subfolder = ""

    def __init__(
        self, tensors: Mapping[str, Stored], model: ModelSpec, where: Path, source: Path, dtype: str | None
    ) -> None:
        self.entries = {name: _entry(name, t, dtype) for name, t in as_hf(tensors, model, where).items()}
        self._source = source

    def file_name(self, number: int, total: int) -> str:
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def write(self, stream: Stream, names: Sequence[str], pieces: Pieces) -> Record:
        stream.write(header({n: (self.entries[n].source.shape, self.entries[n].dtype) for n in names}))
        for name in names:
            for piece in pieces(name):
                stream.write(_bytes(piece))
        return {"tensors": list(names)}

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None:
        file_of = {name: file for file, record in records.items() for name in record["tensors"]}
        total = sum(entry.num_bytes for entry in self.entries.values())
        largest = max(self.entries.values(), key=lambda entry: entry.num_bytes)
        hf.finish_checkpoint(
            folder, self._source, {n: file_of[n] for n in self.entries}, total, _DTYPE_NAMES[largest.dtype]
        )


class MegatronOutput:
    """`release/`, `latest_checkpointed_iteration.txt` for Megatron-LM's --load, and `huggingface/` with the
    configuration and tokenizer of `source`.
    """

    subfolder = RELEASE

    def __init__(
        self, tensors: Mapping[str, Stored], model: ModelSpec, source: Path, dtype: str | None
    ) -> None:
        made = as_megatron(tensors, model, source)
        self.entries = {target.name: _entry(target.name, t, dtype) for target, t in made.items()}
        self._targets = {target.name: target for target in made}
        self._model, self._source = model, source

    def file_name(self, number: int, total: int) -> str:
        return f"__0_{number}.distcp"

    def write(self, stream: Stream, names: Sequence[str], pieces: Pieces) -> Record:
        """Each tensor as torch.save writes it: one is in memory at a time."""
        places = {}
        memory = bytearray(max((self.entries[name].num_bytes for name in names), default=0))
        for name in names:
            entry, begin, end = self.entries[name], stream.tell(), 0
            values = torch.frombuffer(memoryview(memory)[: entry.num_bytes], dtype=entry.dtype)
            whole = values.view(entry.source.shape)
            for piece in pieces(name):
                whole[end : end + len(piece)] = piece
                end += len(piece)
            stacked = whole.view(*(1 for _ in self._targets[name].index), *whole.shape)
            torch.save(stacked, stream)  # type: ignore[arg-type]
            places[name] = [begin, stream.tell() - begin]
        return {"places": places}

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None:
        inner = folder / RELEASE
        empty = io.BytesIO()
        torch.save([None], empty)
        (inner / "__0_extra.distcp").write_bytes(empty.getvalue())
        metadata = Metadata(state_dict_metadata={}, storage_data={})
        for file, record in records.items():
            for name, (offset, length) in record["places"].items():
                for key in self._targets[name].keys:
                    self._add(metadata, key, self._targets[name], _StorageInfo(file, offset, length))
        for key in extra_states(self._model):  # all of them the same few bytes
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            info = _StorageInfo("__0_extra.distcp", 0, len(empty.getvalue()))
            metadata.storage_data[MetadataIndex(key)] = info
        (inner / ".metadata").write_bytes(pickle.dumps(metadata))
        common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
        torch.save(common, inner / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        (inner / "metadata.json").write_text(json.dumps(backend))
        (folder / "latest_checkpointed_iteration.txt").write_text(RELEASE)
        (folder / "huggingface").mkdir(exist_ok=True)
        for file in hf.side_files(self._source):
            shutil.copy(file, folder / "huggingface" / file.name)

    def _add(self, metadata: Metadata, key: str, target: Target, info: _StorageInfo) -> None:
        entry = self.entries[target.name]
        shape = entry.source.shape
        whole = metadata.state_dict_metadata.setdefault(
            key,
            TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype), torch.Size((*target.stack, *shape)), []
            ),
        )
        offsets = torch.Size((*target.index, *(0 for _ in shape)))
        sizes = torch.Size((*(1 for _ in target.index), *shape))
        assert isinstance(whole, TensorStorageMetadata)
        whole.chunks.append(ChunkStorageMetadata(offsets, sizes))
        metadata.storage_data[MetadataIndex(key, offsets)] = info


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
