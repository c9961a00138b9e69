"""Megatron's older checkpoints, read only: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one file for each
tensor-, pipeline- and expert-parallel rank, with that rank's own numbers of layers and experts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dapo.convert.tensors import Block, Stored
from megatron_dapo.convert.torch_files import SavedTensor, read_torch_file
from megatron_dapo.errors import UserError
from megatron_dapo.weights.names import EXPERT, Row, row_of

_NAMES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")
_CHUNK = re.compile(r"model(\d*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Of the run that saved. Experts are whole (etp 1) or split as everything else is (etp = tp)."""

    tp: int
    pp: int
    ep: int
    etp: int

    def ranks(self) -> list[tuple[int, int, int]]:
        """(tp, pp, ep) of every folder. Megatron numbers the ranks of a stage by tensor parallelism first
        and, where experts are concerned, by expert-tensor, then expert parallelism.
        """
        numbers = range(math.lcm(self.tp, self.etp * self.ep))
        in_stage = sorted({(n % self.tp, n // self.etp % self.ep) for n in numbers})
        return [(tp, pp, ep) for pp in range(self.pp) for tp, ep in in_stage]

    def folder(self, tp: int, pp: int, ep: int) -> str:
        name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "")
        return name + (f"_{ep:03d}" if self.ep > 1 else "")


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter of one rank, by its global name."""

    name: str
    row: Row
    file: Path
    tensor: SavedTensor


def read_folder(folder: Path) -> tuple[dict[str, Stored], Layout, Mapping[str, Any]]:
    """Every parameter of the model with global numbers, the layout, and the rest of the first rank's file.

    UserError for a missing rank, a layout that the files contradict, and kinds of checkpoints that cannot be
    put together.
    """
    first = _read(folder / sorted(p.name for p in folder.glob("mp_rank_*"))[0])
    layout = _layout(folder, first)
    _check_version(folder, first)
    parts: dict[str, dict[int, _Held]] = defaultdict(dict)  # by name and tensor-parallel part
    for held, tp in _all_ranks(folder, layout):
        parts[held.name].setdefault(0 if held.row.expert and layout.etp == 1 else tp, held)
    tensors = {name: _merged(folder, found, layout) for name, found in parts.items()}
    return tensors, layout, first


def _layout(folder: Path, first: Mapping[str, Any]) -> Layout:
    """As the arguments in the checkpoint say; its folders must be exactly those of that layout."""
    args = first.get("args")
    if args is None or not hasattr(args, "tensor_model_parallel_size"):
        raise UserError(
            f"{folder}: mp_rank_* without the arguments of Megatron's training; its layout is unknown"
        )
    tp = args.tensor_model_parallel_size
    layout = Layout(
        tp=tp,
        pp=getattr(args, "pipeline_model_parallel_size", None) or 1,
        ep=getattr(args, "expert_model_parallel_size", None) or 1,
        etp=getattr(args, "expert_tensor_parallel_size", None) or tp,
    )
    if layout.etp not in (1, tp):
        raise UserError(
            f"{folder}: expert_tensor_parallel_size={layout.etp} beside tensor_model_parallel_size={tp} is "
            "not supported in mp_rank_* folders; save it as torch_dist"
        )
    expected = {layout.folder(t, p, e) for t, p, e in layout.ranks()}
    there = {path.name for path in folder.glob("mp_rank_*")}
    if expected != there:
        wrong = sorted(expected ^ there)[0]
        raise UserError(
            f"{folder} was saved by tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, but {wrong} is "
            f"{'missing' if wrong in expected else 'there, too'}; copy all folders of one checkpoint"
        )
    return layout


def _check_version(folder: Path, first: Mapping[str, Any]) -> None:
    if (version := first.get("checkpoint_version", 0)) < 3:
        raise UserError(
            f"{folder}: checkpoint_version {version} orders query, key and value in another way than 3.0; "
            "load and save it with a newer Megatron-LM"
        )


def _read(rank_folder: Path) -> dict[str, Any]:
    for name in _NAMES:
        if (rank_folder / name).is_file():
            return read_torch_file(rank_folder / name)
    raise UserError(f"{rank_folder} has no {_NAMES[0]}")


def _all_ranks(folder: Path, layout: Layout) -> Iterator[tuple[_Held, int]]:
    """Every parameter of every rank, and the rank's tensor-parallel number."""
    offsets = _first_layers(folder, layout)
    for tp, pp, ep in layout.ranks():
        rank_folder = folder / layout.folder(tp, pp, ep)
        state = _read(rank_folder)
        file = next(rank_folder / name for name in _NAMES if (rank_folder / name).is_file())
        for chunk, parameters in _chunks(state):
            experts = len({m.group() for name in parameters if (m := EXPERT.search(name))})
            for local, tensor in parameters.items():
                name = _LAYER.sub(lambda m, at=offsets[chunk, pp]: str(at + int(m.group())), local)
                name = EXPERT.sub(lambda m, at=ep * experts: str(at + int(m.group())), name)
                yield _Held(name, _row(name, folder), file, _checked(tensor, local, file)), tp


def _first_layers(folder: Path, layout: Layout) -> dict[tuple[int, int], int]:
    """Global number of the first layer, by model chunk and pipeline stage: an interleaved pipeline deals its
    chunks out to the stages in turn.
    """
    counts: dict[tuple[int, int], int] = {}
    for pp in range(layout.pp):
        for chunk, parameters in _chunks(_read(folder / layout.folder(0, pp, 0))):
            numbers = {int(m.group()) for name in parameters if (m := _LAYER.search(name))}
            counts[chunk, pp] = len(numbers)
    offsets, end = {}, 0
    for key in sorted(counts):
        offsets[key], end = end, end + counts[key]
    return offsets


def _chunks(state: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, SavedTensor]]]:
    """Number and parameters of each model chunk of a rank's file."""
    for key, parameters in state.items():
        if match := _CHUNK.match(key):
            tensors = {name.removeprefix("module."): t for name, t in parameters.items()}
            yield int(match[1] or 0), {n: t for n, t in tensors.items() if isinstance(t, SavedTensor)}


def _row(name: str, folder: Path) -> Row:
    try:
        return row_of(name)
    except ValueError as error:
        older = name.startswith("language_model.")
        hint = "it is of Megatron's models before megatron-core" if older else "no model here has it"
        raise UserError(f"{folder} has the parameter {name}: {hint}") from error


def _checked(tensor: SavedTensor, name: str, file: Path) -> SavedTensor:
    end = tensor.start + tensor.dtype.itemsize * _size(tensor)
    if not tensor.contiguous or not 1 <= len(tensor.shape) <= 2:
        raise UserError(f"{file}: {name} {list(tensor.shape)} is no contiguous vector or matrix")
    if end > file.stat().st_size:
        raise UserError(f"{file} is cut short inside tensor {name}")
    return tensor


def _size(tensor: SavedTensor) -> int:
    return tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) == 2 else 1)


def _merged(folder: Path, found: Mapping[int, _Held], layout: Layout) -> Stored:
    """The whole of the parameter from its tensor-parallel parts."""
    held = found[0]
    split, rows, dtype = held.row.split, held.tensor.shape[0], held.tensor.dtype
    columns, of = _size(held.tensor) // rows, layout.etp if held.row.expert else layout.tp
    parts = [found[rank] for rank in range(of) if rank in found]
    if len(parts) != of or any(part.tensor.shape != held.tensor.shape for part in parts):
        raise UserError(
            f"{folder}: the {of} tensor-parallel ranks do not have {held.name} alike; the layout that the "
            "checkpoint's arguments say is not that of its files"
        )
    if split == "replicated":
        parts, of = parts[:1], 1
    blocks = []
    for rank, part in enumerate(parts):
        whole = Block(part.file, part.tensor.start, rows, columns)
        if split == "gate_up":
            half = rows // 2
            second = whole.start + half * columns * dtype.itemsize
            blocks.append(replace(whole, rows=half, at_row=half * rank))
            blocks.append(replace(whole, rows=half, at_row=half * (of + rank), start=second))
        elif split == "row":
            blocks.append(replace(whole, at_column=columns * rank))
        else:
            blocks.append(replace(whole, at_row=rows * rank))
    shape = (rows, columns * of) if split == "row" else (rows * of, *held.tensor.shape[1:])
    return Stored(shape, dtype, tuple(blocks))
