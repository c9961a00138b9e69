"""Hugging Face tensors of Megatron parameters and the other way round, by the table in weights/names.py: rows
are relabelled, nothing is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_dapo.convert.disk_keys import Target, targets
from megatron_dapo.convert.tensors import Stored, stacked
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ARCHITECTURES, ModelSpec, read_model
from megatron_dapo.weights.names import Row, hf_shapes, row_of
from megatron_dapo.weights.slices import Slice, slices_of

Tensors = Mapping[str, Stored]
HOW_TO_ADD = (
    "to add a model edit megatron_dapo/model_spec.py (ARCHITECTURES), megatron_dapo/weights/names.py (ROWS) "
    "and megatron_dapo/policy/model.py (transformer_config), see docs/adding-a-model.md"
)


def read_spec(folder: Path) -> ModelSpec:
    """The model of a Hugging Face folder. UserError names the files to edit for an architecture that is not
    known.
    """
    architecture = read_architecture(folder)
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"{folder}/config.json: architecture {architecture} is not known; {HOW_TO_ADD}")
    try:
        return read_model(folder)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.path=")) from error


def read_architecture(folder: Path) -> str | None:
    """As config.json says; None where it does not, or cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def as_hf(tensors: Tensors, model: ModelSpec, where: Path) -> dict[str, Stored]:
    """The Hugging Face tensors that Megatron parameters (of no layout, vocabulary padded or not) make up.
    `where` is named in errors.
    """
    parts: dict[str, list[tuple[int, Stored, int, int]]] = {name: [] for name in hf_shapes(model)}
    seen: set[tuple[str, ...]] = set()  # a parameter may be there under both of its names
    for name, tensor in tensors.items():
        if model.tied and name == "output_layer.weight":
            continue
        row = _row(name, where)
        if tuple(row.hf) in seen:
            continue
        seen.add(tuple(row.hf))
        if missing := [hf for hf in row.hf if hf not in parts]:
            raise UserError(
                f"{where} has the parameter {name}, config.json's model has no {missing[0]}; they are of "
                "different models"
            )
        for part in _whole_rows(name, tensor, model, where):
            parts[part.hf].append((part.hf_start, tensor, part.start, part.size))
    return {
        name: _joined(name, found, shape, where)
        for (name, shape), found in zip(hf_shapes(model).items(), parts.values(), strict=True)
    }


def as_megatron(tensors: Tensors, model: ModelSpec, where: Path) -> dict[Target, Stored]:
    """The Megatron parameters, of no layout, that the tensors of a Hugging Face checkpoint make up."""
    check_hf(tensors, model, where)
    made = {}
    for target in targets(model):
        slices = slices_of(target.name, model, tp=1, tp_rank=0)
        rows = [(tensors[s.hf], s.hf_start, s.size) if s.dim == 0 else _all(tensors[s.hf]) for s in slices]
        if len({tensor.dtype for tensor, _, _ in rows}) > 1:
            names = ", ".join(dict.fromkeys(s.hf for s in slices))
            raise UserError(
                f"{where}: {names} are of different types and make one parameter; cast them first"
            )
        made[target] = stacked(rows)
    return made


def check_hf(tensors: Tensors, model: ModelSpec, where: Path) -> dict[str, Stored]:
    """The tensors that config.json asks for. UserError for a missing or an unknown one, or another shape."""
    shapes = hf_shapes(model)
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(
                f"{where} has no tensor {name}, which {model.architecture} needs; its index lacks an entry, "
                "or config.json is of another model"
            )
        if tensors[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} is {list(tensors[name].shape)}, config.json says {list(shape)}; "
                "they are of different models"
            )
    for name in tensors.keys() - shapes.keys():
        if not name.endswith("rotary_emb.inv_freq") and not (model.tied and name == "lm_head.weight"):
            raise UserError(f"{where}: {model.architecture} has no tensor {name}; {HOW_TO_ADD}")
    return {name: tensors[name] for name in shapes}


def by_parameter(tensors: Tensors, where: Path) -> dict[str, Stored]:
    """Megatron parameters under names that do not depend on the layer spec: the Hugging Face tensors they are
    made of, joined by +.
    """
    return {" + ".join(_row(name, where).hf): tensor for name, tensor in tensors.items()}


def _row(name: str, where: Path) -> Row:
    if ".adapter." in name or "lora_" in name:
        raise UserError(f"{where} holds adapters ({name}), not whole weights; merge them with their trainer")
    try:
        return row_of(name)
    except ValueError as error:
        raise UserError(f"{where}: no model here has the parameter {name}; {HOW_TO_ADD}") from error


def _all(tensor: Stored) -> tuple[Stored, int, int]:
    return tensor, 0, tensor.shape[0]


def _whole_rows(name: str, tensor: Stored, model: ModelSpec, where: Path) -> list[Slice]:
    """Which rows of the parameter are which rows of Hugging Face tensors, once its shape is checked."""
    row, slices = _row(name, where), []
    shapes = [model.shape(sizes) for sizes in row.hf.values()]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    padding = tensor.shape[0] - expected[0]
    if tensor.shape[1:] != expected[1:] or padding < 0 or (padding and row.split != "vocab"):
        raise UserError(
            f"{where}: parameter {name} is {list(tensor.shape)}, config.json says {list(expected)}; they are "
            "of different models"
        )
    for part in slices_of(name, model, tp=1, tp_rank=0):
        slices.append(part if part.dim == 0 else Slice(part.hf, 0, 0, 0, tensor.shape[0]))
    return slices


def _joined(
    name: str, found: list[tuple[int, Stored, int, int]], shape: tuple[int, ...], where: Path
) -> Stored:
    found = sorted(found, key=lambda part: part[0])
    if not found:
        raise UserError(f"{where} has no parameter for the tensor {name}; config.json is of another model")
    tensor = stacked([part[1:] for part in found])
    assert tensor.shape == shape and tensor.covered, (name, tensor.shape, shape)
    return tensor
