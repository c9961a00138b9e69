"""Any checkpoint that is known, from any folder that somebody may name: a model's, a run's, a step's; our
own, Megatron-LM's, and those of verl, slime and NeMo-RL, which hold one of the same formats deeper inside.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dapo.convert import legacy, safetensors_files, torch_dist
from megatron_dapo.convert.tensors import Stored
from megatron_dapo.convert.torch_files import read_torch_file
from megatron_dapo.errors import UserError

FORMATS = {
    "hf": "Hugging Face safetensors",
    "torch_dist": "Megatron torch_dist",
    "legacy": "Megatron mp_rank_*",
}
_NUMBERED = re.compile(r"(?:step|iter|global_step)_(\d+)")
_TRACKER = "latest_checkpointed_iteration.txt"
# Folders that hold the weights of a folder that does not: verl's actor, verl's and our own Hugging Face
# folders, NeMo-RL's policy, our own run folder.
_INNER = ("actor", "model/dist_ckpt", "dist_ckpt", "policy/weights", "checkpoints")
_INNER_HF = ("model/huggingface", "huggingface")
_LAYOUT_ARGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data_parallel_size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open checkpoint. Tensors have Hugging Face's names, or Megatron's with global numbers of layers and
    experts.

    hf_folder: a Hugging Face folder of the same model, where one is known. step, layout: of the training, as
    far as the checkpoint tells.
    """

    format: str
    folder: Path
    tensors: Mapping[str, Stored]
    hf_folder: Path | None = None
    step: int | None = None
    layout: Mapping[str, int] = field(default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """UserError when nothing that is known lies there, with the reason where the kind is known."""
    form, folder = find(path)
    if form == "hf":
        tensors = safetensors_files.read_folder(folder)
        has_config = (folder / "config.json").is_file()
        return Checkpoint(
            format=form, folder=folder, tensors=tensors, hf_folder=folder if has_config else None
        )
    if form == "legacy":
        tensors, layout, rest = legacy.read_folder(folder)
        sizes = _args_layout(rest.get("args")) | dataclasses.asdict(layout)
        step = rest.get("iteration")
    else:
        tensors = torch_dist.read_folder(folder)
        step, sizes = _training(folder)
        sizes = {"tp": torch_dist.tensor_parallel(tensors)} | sizes
    return Checkpoint(
        format=form,
        folder=folder,
        tensors=tensors,
        hf_folder=_hf_folder(folder),
        step=step if isinstance(step, int) else _number(folder),
        layout=sizes,
    )


def find(path: Path) -> tuple[str, Path]:
    """The format (a key of FORMATS) and the folder that holds its files, `path` itself or one inside it."""
    folder = path
    for _ in range(8):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        if form := _format(folder):
            return form, folder
        _refuse(folder)
        if (inner := _inner(folder)) is None:
            break
        folder = inner
    raise UserError(
        f"{path} holds no checkpoint that is known: no safetensors with config.json, no Megatron torch_dist "
        "(.metadata, metadata.json), no mp_rank_* folders"
    )


def _format(folder: Path) -> str | None:
    if any(folder.glob("mp_rank_*/model*.pt")):
        return "legacy"
    if (folder / ".metadata").is_file() and (folder / "metadata.json").is_file():
        backend = _read_json(folder / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(f"{folder}: sharded_backend {backend} is not read; save it as torch_dist")
        return "torch_dist"
    if (folder / "model.safetensors.index.json").is_file() or (folder / "model.safetensors").is_file():
        return "hf"
    return None


def _refuse(folder: Path) -> None:
    """UserError for what is known and cannot be read."""
    if (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} is a distributed checkpoint of torch, not of Megatron (no metadata.json): FSDP or "
            "DTensor; export it with its trainer (NeMo-RL: examples/converters/convert_dcp_to_hf.py)"
        )
    if (folder / "metadata.json").is_file() and any(folder.glob("*.distcp")):
        raise UserError(f"{folder} has no .metadata: its save was cut off; take an earlier one")
    if any(folder.glob("model_world_size_*_rank_*.pt")) or (folder / "fsdp_config.json").is_file():
        raise UserError(
            f"{folder} holds FSDP shards of verl, not Megatron's; merge them with python -m verl.model_merger"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter (LoRA), not whole weights; merge it with its trainer")
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} has .bin files; convert them to safetensors (save_pretrained) first")


def _inner(folder: Path) -> Path | None:
    """Where the weights of this folder are: as its tracker or manifest says, at a known place, or its newest
    step.
    """
    if (folder / _TRACKER).is_file():
        word = (folder / _TRACKER).read_text().strip()
        names = [word]
        if word.isdigit():
            names = [f"iter_{int(word):07d}", f"global_step_{word}", f"global_steps_{word}"]
        if found := [folder / name for name in names if (folder / name).is_dir()]:
            return found[0]
        raise UserError(f"{folder / _TRACKER} says {word}, but there is no {names[0]} beside it")
    if (folder / "ckpt_contents.json").is_file():
        model = _read_json(folder / "ckpt_contents.json").get("contents", {}).get("model", {})
        if "path" in model:
            return folder / model["path"]
    for name in _INNER:
        if (folder / name).is_dir():
            return folder / name
    numbered = [p for p in folder.iterdir() if p.is_dir() and _number(p) is not None]
    numbered = [p for p in numbered if (p / "run.pt").is_file()] or numbered  # ours that are whole
    if numbered:
        return max(numbered, key=lambda p: _number(p) or 0)
    with_weights = (folder / name for name in _INNER_HF if any((folder / name).glob("*.safetensors")))
    return next(with_weights, folder / "model" if (folder / "model" / ".metadata").is_file() else None)


def _number(folder: Path) -> int | None:
    match = _NUMBERED.fullmatch(folder.name)
    return int(match[1]) if match else None


def _training(folder: Path) -> tuple[int | None, dict[str, int]]:
    """Step and layout of a torch_dist checkpoint: from the run that wrote it, from Megatron's arguments."""
    if (folder / "run.pt").is_file():
        sections = _run_config(folder).get("layout", {})
        names = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "vpp": "virtual_pipeline_parallel"}
        names |= {"cp": "context_parallel", "ep": "expert_parallel", "etp": "expert_tensor_parallel"}
        names |= {"dp": "data_parallel"}
        found = {short: sections[name] for short, name in names.items() if sections.get(name)}
        return read_torch_file(folder / "run.pt").get("step"), found
    if not (folder / "common.pt").is_file():
        return None, {}
    common = read_torch_file(folder / "common.pt")
    return common.get("iteration"), _args_layout(common.get("args"))


def _args_layout(args: Any) -> dict[str, int]:
    values = {short: getattr(args, name, None) for short, name in _LAYOUT_ARGS.items()}
    return {short: value for short, value in values.items() if isinstance(value, int)}


def _hf_folder(folder: Path) -> Path | None:
    """A Hugging Face folder of the same model: beside the weights, or the one that the run started from."""
    beside = [place / "huggingface" for place in (folder, folder.parent)]
    if path := _run_config(folder).get("model", {}).get("path"):
        beside.append(Path(path).expanduser())
    return next((place for place in beside if (place / "config.json").is_file()), None)


def _run_config(folder: Path) -> dict[str, Any]:
    """config.yaml of our own run that the checkpoint is of; empty for others."""
    file = folder.parent.parent / "config.yaml"
    if folder.parent.name != "checkpoints" or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text()) or {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
