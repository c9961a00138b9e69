"""Hugging Face checkpoint folders: find one, read slices of its tensors, write one with its tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_dapo.errors import UserError

OWNERS = {"Qwen": "Qwen"}  # of model families on the hub, by what their names begin with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_folder(model: str) -> Path:
    """A local folder, or the snapshot folder of a hub name (downloaded on first use). A name without its
    owner, such as "Qwen2.5-32B", is looked for under its family's.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    model = with_owner(model)
    if folder.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise UserError(
            f"model.path={model!r} is neither a folder nor a hub name (owner/name; the owner may be left out "
            f"for {', '.join(OWNERS)} models)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:
        raise UserError(
            f"model.path={model!r} is not a folder here and could not be fetched from the hub: {error}; give "
            f"a local folder"
        ) from error


def with_owner(model: str) -> str:
    """The name with its owner, if it is of a family that has one; else as it is."""
    family = next((prefix for prefix in OWNERS if re.match(rf"{prefix}[\w.-]*$", model)), None)
    return f"{OWNERS[family]}/{model}" if family else model


def read_weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor of a safetensors checkpoint, from its index or its only file. UserError where there
    is none, or it cannot be read.
    """
    index, only = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} cannot be read: {type(error).__name__}: {error}") from error
    if not only.is_file():
        raise UserError(
            f"model.path={folder} has no model.safetensors; convert the checkpoint to safetensors first"
        )
    with _open(only) as file:
        return dict.fromkeys(file.keys(), only.name)


class CheckpointReader:
    """Slices of the tensors of a safetensors checkpoint, read lazily (memory-mapped)."""

    def __init__(self, folder: Path) -> None:
        self._file_of = read_weight_map(folder)
        self._folder = folder
        self._files: dict[str, Any] = {}

    def read(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """name[start : start + size] along `dim`. UserError names a missing tensor and the folder."""
        if name not in self._file_of:
            raise UserError(
                f"checkpoint {self._folder} has no tensor {name!r}; is config.json of the same model?"
            )
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = _open(self._folder / file)
        whole = self._files[file].get_slice(name)
        return whole[start : start + size] if dim == 0 else whole[:, start : start + size]


def _open(file: Path) -> Any:
    """A safetensors file, memory-mapped. UserError when it is missing, cut short or something else."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def write_shard(folder: Path, number: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write one safetensors file of a checkpoint; returns its name."""
    name = f"model-{number:05d}.safetensors"
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / name,
        metadata={"format": "pt"},
    )
    return name


def finish_checkpoint(
    folder: Path, source: Path, weight_map: Mapping[str, str], total_bytes: int, dtype: str
) -> None:
    """Write the index; copy tokenizer and configuration of `source`, with `dtype` written into the latter."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file in side_files(source):
        shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def side_files(source: Path) -> Iterable[Path]:
    """Everything but weights: configuration, generation defaults, tokenizer, chat template, licence."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix in {".json", ".jinja", ".txt", ".model"}
            and not file.name.endswith(".index.json")
        ):
            yield file


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to `final`, so that readers see the old or the new one, whole."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
