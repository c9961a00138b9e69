"""Two checkpoints, tensor by tensor, whatever their formats: equal in every bit, or how far apart."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.convert.checkpoint import Checkpoint, open_checkpoint
from megatron_dapo.convert.mapping import as_hf, by_parameter, check_hf, read_spec
from megatron_dapo.convert.tensors import PIECE_BYTES, Reader, Stored
from megatron_dapo.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of one tensor. elements: that have other bits, or other values where the types differ; NaN equals NaN.
    largest: absolute difference of values, NaN where only one side has a number.
    """

    name: str
    elements: int
    largest: float
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    num_tensors: int
    differences: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not (self.differences or self.only_a or self.only_b)


def compare(a: Path, b: Path, hf_source: Path | None = None, workers: int = 1) -> Comparison:
    """hf_source: a Hugging Face folder of the model, where neither checkpoint leads to one."""
    left, right = _alike(open_checkpoint(a), open_checkpoint(b), hf_source)
    common = [name for name in left if name in right]
    if workers == 1:
        found = _differences(a, b, hf_source, 0, 1)
    else:
        arguments = [(a, b, hf_source, number, workers) for number in range(workers)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            found = [difference for part in pool.starmap(_differences, arguments) for difference in part]
    order = {name: number for number, name in enumerate(common)}
    return Comparison(
        num_tensors=len(common),
        differences=tuple(sorted(found, key=lambda difference: order[difference.name])),
        only_a=tuple(name for name in left if name not in right),
        only_b=tuple(name for name in right if name not in left),
    )


def _alike(
    a: Checkpoint, b: Checkpoint, hf_source: Path | None
) -> tuple[Mapping[str, Stored], Mapping[str, Stored]]:
    """Both under the same kind of names: Hugging Face's where one of them has these or the model is known."""
    if a.format == b.format == "hf":
        return a.tensors, b.tensors
    folder = hf_source or next((c.hf_folder for c in (a, b) if c.format == "hf"), None)
    folder = folder or a.hf_folder or b.hf_folder
    if folder is None:
        if "hf" in (a.format, b.format):
            raise UserError(f"{a.folder} and {b.folder}: no config.json of the model; give --hf-source")
        return by_parameter(a.tensors, a.folder), by_parameter(b.tensors, b.folder)
    model = read_spec(folder)

    def named(side: Checkpoint) -> Mapping[str, Stored]:
        if side.format == "hf":
            return check_hf(side.tensors, model, side.folder)
        return as_hf(side.tensors, model, side.folder)

    return named(a), named(b)


def _differences(a: Path, b: Path, hf_source: Path | None, number: int, of: int) -> list[Difference]:
    """Of every `of`-th tensor from `number` on."""
    torch.set_num_threads(1)
    left, right = _alike(open_checkpoint(a), open_checkpoint(b), hf_source)
    names = [name for name in left if name in right][number::of]
    readers = Reader(), Reader()
    try:
        return [d for name in names if (d := _difference(name, left[name], right[name], readers))]
    finally:
        for reader in readers:
            reader.close()


def _difference(name: str, a: Stored, b: Stored, readers: tuple[Reader, Reader]) -> Difference | None:
    shapes, dtypes = (a.shape, b.shape), (_dtype_name(a), _dtype_name(b))
    if a.shape[1:] != b.shape[1:]:
        return Difference(name=name, elements=0, largest=float("nan"), dtypes=dtypes, shapes=shapes)
    elements, largest, rows = 0, 0.0, min(a.shape[0], b.shape[0])
    step = max(1, PIECE_BYTES // max(1, a.row_bytes, b.row_bytes))
    for start in range(0, rows, step):
        size = min(step, rows - start)
        count, distance = _distance(
            readers[0].read(name, a, start, size), readers[1].read(name, b, start, size)
        )
        elements += count
        if not largest >= distance:  # NaN stays
            largest = distance
    if elements or a.shape != b.shape or a.dtype != b.dtype:
        return Difference(name=name, elements=elements, largest=largest, dtypes=dtypes, shapes=shapes)
    return None


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """Number of elements that differ, and the largest difference."""
    if a.dtype == b.dtype:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        differ = a.view(bits) != b.view(bits)
    else:
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
        differ = (a != b) & ~(a.isnan() & b.isnan())
    if not (count := int(differ.sum())):
        return 0, 0.0
    return count, float((a[differ].double() - b[differ].double()).abs().max())


def _dtype_name(tensor: Stored) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def as_json(result: Comparison) -> dict[str, Any]:
    return {
        "equal": result.equal,
        "tensors": result.num_tensors,
        "different": [
            {
                "name": d.name,
                "elements": d.elements,
                "largest": d.largest,
                "dtypes": list(d.dtypes),
                "shapes": [list(shape) for shape in d.shapes],
            }
            for d in result.differences
        ],
        "only_in_a": list(result.only_a),
        "only_in_b": list(result.only_b),
    }


def as_text(result: Comparison) -> str:
    lines = []
    for d in result.differences:
        what = f"{d.elements} elements, largest difference {d.largest:g}"
        if d.shapes[0] != d.shapes[1]:
            what = f"shapes {list(d.shapes[0])} and {list(d.shapes[1])}"
        dtypes = "" if d.dtypes[0] == d.dtypes[1] else f" ({d.dtypes[0]} and {d.dtypes[1]})"
        lines.append(f"{d.name}: {what}{dtypes}")
    lines += [f"{name}: only in the first" for name in result.only_a]
    lines += [f"{name}: only in the second" for name in result.only_b]
    same = result.num_tensors - len(result.differences)
    lines.append(f"{same} of {result.num_tensors} tensors are equal in every bit")
    return "\n".join(lines)
