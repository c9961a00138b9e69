"""Writing the policy's weights as a Hugging Face checkpoint: every rank sends its slices to rank 0, which
writes one file per chunk.

Needs no engine and no memory that ranks share, so the ranks may be on any host.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.sync.export_chunks import CHUNK_BYTES, Part, cut, parts_by_chunk, region
from megatron_dapo.weights import hf
from megatron_dapo.weights.names import hf_shapes
from megatron_dapo.weights.slices import Shard, Slice

Shapes = Mapping[str, tuple[int, ...]]


def export(
    shards: Sequence[Shard],
    spec: ModelSpec,
    dtype: str,
    rank: int,
    control: Any,
    folder: Path,
    source: Path,
    *,
    card: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Write `folder`, whole or not at all, with the tokenizer and configuration of `source` and, on rank 0, a
    `card` as its README.md. Collective.

    `shards` is what this rank contributes, `control` a gloo group of all ranks. Rank 0 holds the tensors of
    one chunk and one message of at most the same size; every other rank holds one message. UserError on
    every rank when rank 0 cannot write.
    """
    shapes = hf_shapes(spec)
    plan = cut(shapes, hf.DTYPES[dtype].itemsize, chunk_bytes)
    parts = parts_by_chunk(plan, shards)
    slices_by_rank: list[Any] = [None] * dist.get_world_size(control)
    mine = [[part.slice for part in in_chunk] for in_chunk in parts]
    dist.gather_object(mine, slices_by_rank if rank == 0 else None, dst=0, group=control)
    writer = _Writer(folder, source, dtype, card) if rank == 0 else None
    with _failing_together(control, folder):
        if writer:
            _check_coverage(shapes, slices_by_rank)
            writer.start()
    for number, chunk in enumerate(plan):
        if writer:
            tensors = {name: torch.empty(shape, dtype=hf.DTYPES[dtype]) for name, shape in chunk.items()}
            _fill(tensors, parts[number])
            for sender in range(1, len(slices_by_rank)):
                _receive(tensors, slices_by_rank[sender][number], sender, control)
        else:
            _send(parts[number], shapes, dtype, control)
        with _failing_together(control, folder):
            if writer:
                writer.write(tensors)
        tensors = {}  # not beside those of the next chunk
    with _failing_together(control, folder):
        if writer:
            writer.finish()


class _Writer:
    """The folder that rank 0 writes: beside its final place until it is complete."""

    def __init__(self, folder: Path, source: Path, dtype: str, card: str | None) -> None:
        self._folder, self._source, self._dtype, self._card = folder, source, dtype, card
        self._temporary = folder.with_name(folder.name + ".tmp")
        self._file_of: dict[str, str] = {}
        self._num_files = self._num_bytes = 0

    def start(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)  # of an export that was cut off
        self._temporary.mkdir(parents=True)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._num_files += 1
        file = hf.write_shard(self._temporary, self._num_files, tensors)
        self._file_of |= dict.fromkeys(tensors, file)
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        hf.finish_checkpoint(self._temporary, self._source, self._file_of, self._num_bytes, self._dtype)
        if self._card is not None:
            (self._temporary / "README.md").write_text(self._card)
        hf.replace_folder(self._temporary, self._folder)


@torch.no_grad()
def _fill(tensors: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> None:
    for part in parts:
        region(tensors, part.slice).copy_(part.values())


@torch.no_grad()
def _send(parts: Sequence[Part], shapes: Shapes, dtype: str, control: Any) -> None:
    """All parts of a chunk as one message, end to end; none where this rank has no part of it."""
    if not parts:
        return
    sizes = [_num_elements(shapes, part.slice) for part in parts]
    message = torch.empty(sum(sizes), dtype=hf.DTYPES[dtype])
    for values, part in zip(message.split(sizes), parts, strict=True):
        source = part.values()
        values.view(source.shape).copy_(source)
    dist.send(message.view(torch.uint8), dst=0, group=control)


def _receive(tensors: Mapping[str, torch.Tensor], slices: Sequence[Slice], sender: int, control: Any) -> None:
    """What `_send` sent, copied to where it stands in the whole tensors."""
    if not slices:
        return
    regions = [region(tensors, slice_) for slice_ in slices]
    message = torch.empty(sum(r.numel() for r in regions), dtype=regions[0].dtype)
    dist.recv(message.view(torch.uint8), src=sender, group=control)
    for target, values in zip(regions, message.split([r.numel() for r in regions]), strict=True):
        target.copy_(values.view(target.shape))


def _check_coverage(shapes: Shapes, slices_by_rank: Sequence[Sequence[Sequence[Slice]]]) -> None:
    """Each tensor gets as many elements from all ranks together as it has."""
    given: Counter[str] = Counter()
    for in_chunks in slices_by_rank:
        for slices in in_chunks:
            for slice_ in slices:
                given[slice_.hf] += _num_elements(shapes, slice_)
    for name, shape in shapes.items():
        assert given[name] == math.prod(shape), (
            f"the ranks hold {given[name]} of the {math.prod(shape)} elements of {name}"
        )


def _num_elements(shapes: Shapes, slice_: Slice) -> int:
    shape = shapes[slice_.hf]
    return math.prod(shape) // shape[slice_.dim] * slice_.size


@contextmanager
def _failing_together(control: Any, folder: Path) -> Iterator[None]:
    """What fails inside on rank 0 fails on every rank: nobody waits for a next chunk that never comes.
    Collective.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    texts: list[Any] = [failure and f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(texts, src=0, group=control)
    if failure is not None and not isinstance(failure, OSError | SafetensorError):
        raise failure
    if texts[0] is not None:
        raise UserError(f"rank 0 could not export the weights to {folder}: {texts[0]}") from failure
