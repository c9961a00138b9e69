"""Megatron's distributed checkpoints (torch_dist): `.metadata` says which part of which tensor lies where in
the .distcp files, each part as torch.save wrote it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dapo.convert.disk_keys import DiskKey, parse
from megatron_dapo.convert.tensors import Block, Item, Stored, stacked
from megatron_dapo.convert.torch_files import read_pickle
from megatron_dapo.errors import UserError

Chunks = list[tuple[Any, Path, int, int]]  # ChunkStorageMetadata, file, offset and length of its bytes


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every parameter of the model by its name in TransformerEngine's layers, with global numbers of layers
    and experts. UserError for files that are missing or cut short, and parts that make no whole.
    """
    metadata = read_pickle(folder / ".metadata")
    places = _places(folder, metadata)
    whole: dict[str, Stored] = {}
    halves: dict[str, dict[int, Stored]] = defaultdict(dict)
    for key, entry in metadata.state_dict_metadata.items():
        disk_key = parse(key) if hasattr(entry, "chunks") else None
        if disk_key is None:
            continue
        chunks = [(chunk, *_place(places, folder, key, tuple(chunk.offsets))) for chunk in entry.chunks]
        for name, tensor in _parameters(folder, key, disk_key, entry, chunks):
            if disk_key.half is None:
                whole[name] = tensor
            else:
                halves[name][disk_key.half] = tensor
    for name, found in halves.items():
        if len(found) < 2:
            raise UserError(f"{folder}: {name} has one half of a gated linear layer only")
        whole[name] = stacked([(found[half], 0, found[half].shape[0]) for half in (0, 1)])
    for name in [n for n in whole if n.endswith("pre_mlp_layernorm.weight")]:
        whole.pop(name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), None)
    if not whole:
        raise UserError(f"{folder} holds no parameter of a model (optimizer or random state alone)")
    return whole


def tensor_parallel(tensors: Mapping[str, Stored]) -> int:
    """Tensor-parallel ranks of the run that saved them: parts of a row-parallel parameter by columns."""
    for name, tensor in tensors.items():
        if name.endswith("self_attention.linear_proj.weight"):
            return len({block.at_column for block in tensor.blocks})
    return 1


def _places(folder: Path, metadata: Any) -> dict[tuple[str, tuple[int, ...] | None], tuple[Path, int, int]]:
    """File, offset and length by key and offsets in the tensor. UserError where values are compressed."""
    if any(getattr(info, "transform_descriptors", None) for info in metadata.storage_data.values()):
        raise UserError(f"{folder} is compressed (an extension of torch's checkpoints); save it without")
    return {
        (index.fqn, None if index.offset is None else tuple(index.offset)): (
            folder / info.relative_path,
            info.offset,
            info.length,
        )
        for index, info in metadata.storage_data.items()
    }


def _place(places: Any, folder: Path, key: str, offsets: tuple[int, ...]) -> tuple[Path, int, int]:
    if (key, offsets) not in places:
        raise UserError(f"{folder}/.metadata has no place for the part of {key} at {list(offsets)}")
    file, offset, length = places[key, offsets]
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); it holds a part of {key}") from error
    if offset + length > size:
        raise UserError(
            f"{file} is cut short: tensor {key} ends at byte {offset + length}, the file has {size}; "
            "copy or save it again"
        )
    return file, offset, length


def _parameters(
    folder: Path, key: str, disk_key: DiskKey, entry: Any, chunks: Chunks
) -> Iterator[tuple[str, Stored]]:
    """The parameters that one key stands for."""
    axes, size, dtype = disk_key.axes, tuple(entry.size), entry.properties.dtype
    stack, shape = size[:axes], size[axes:]
    if not 1 <= len(shape) <= 2:
        raise UserError(f"{folder}: {key} {list(size)} is no vector or matrix for each layer or expert")
    blocks: dict[tuple[int, ...], list[Block]] = defaultdict(list)
    for chunk, file, offset, length in chunks:
        at, extent = tuple(chunk.offsets), tuple(chunk.sizes)
        matrix = math.prod(extent[axes:])
        item = Item(offset, length, math.prod(extent) * dtype.itemsize)
        inside = itertools.product(*(range(n) for n in extent[:axes]))
        for number, relative in enumerate(inside):
            index = tuple(a + r for a, r in zip(at, relative, strict=False))
            blocks[index].append(
                Block(
                    file,
                    number * matrix * dtype.itemsize,
                    rows=extent[axes],
                    columns=math.prod(extent[axes + 1 :]),
                    at_row=at[axes],
                    at_column=at[axes + 1] if len(shape) == 2 else 0,
                    item=item,
                )
            )
    for index in itertools.product(*(range(n) for n in stack)):
        tensor = Stored(shape, dtype, tuple(blocks[index]))
        if not tensor.covered:
            where = f" at {list(index)}" if index else ""
            raise UserError(
                f"{folder}: the parts of {key}{where} in .metadata do not make its shape {list(shape)}; "
                "the layout that it describes is not that of the files"
            )
        yield disk_key.parameter(index), tensor
