"""Hugging Face checkpoints: what the model is, reading slices of its tensors, writing a new checkpoint beside its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What config.json does not say because the model's code does."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    refused: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json, each with the only value that is supported
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes for keys that config.json leaves out


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(refused={"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": Architecture(refused={"sliding_window": None}, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, refused={"use_sliding_window": False}),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True, refused={"attention_bias": False, "use_sliding_window": False}, defaults={"head_dim": 128}
    ),
    "Qwen3MoeForCausalLM": Architecture(
        qk_norm=True,
        experts=True,
        refused={"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        defaults={"norm_topk_prob": False},
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class HFModel:
    """Sizes and options of a decoder-only model, read from config.json."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int  # of one expert, where there are experts
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool = False
    num_experts: int = 0  # 0: dense, and so the other two
    experts_per_token: int = 0
    renormalize_experts: bool = False  # the chosen experts' probabilities sum to 1
    norm_eps: float
    rope_theta: float
    rope_factor: float | None
    max_positions: int
    eos_token_ids: tuple[int, ...]

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def dense(self) -> bool:
        return not self.num_experts

    @property
    def untied(self) -> bool:
        return not self.tied

    def shape(self, sizes: Sequence[str]) -> tuple[int, ...]:
        """The shape of a tensor from the names of its sizes, fields or properties of this class."""
        return tuple(getattr(self, size) for size in sizes)


def resolve_folder(model: str) -> Path:
    """A local folder, or the snapshot folder of a hub name (downloaded on first use)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise ValueError(f"model.path={model!r} is neither a folder nor a hub name (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:
        raise ValueError(
            f"model.path={model!r} is not a folder here and could not be fetched from the hub: {error}; give a local folder"
        ) from error


def read_model(folder: Path) -> HFModel:
    """Read config.json; ValueError for a missing tokenizer or a model this package cannot train, before anything is loaded."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={folder} has no config.json; it must be a Hugging Face checkpoint folder")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ValueError(f"model.path={folder} has no tokenizer (tokenizer.json); save one there with tokenizer.save_pretrained")
    config = json.loads(file.read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model.path={folder}: architecture {architecture} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    kind = ARCHITECTURES[architecture]
    config = {**kind.defaults, **config}
    for key, value in {"hidden_act": "silu", **kind.refused}.items():
        if config.get(key) not in (None, value):
            raise ValueError(
                f"model.path={folder}: {key}={json.dumps(config[key])} is not supported for {architecture}, only {json.dumps(value)}"
            )
    if kinds := set(config.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(f"model.path={folder}: layer_types {sorted(kinds)} are not supported, only full_attention")
    if kind.experts and config["num_experts_per_tok"] == 1 and config["norm_topk_prob"]:
        raise ValueError(
            f"model.path={folder}: num_experts_per_tok=1 with norm_topk_prob=true is not supported: the weight of the one expert is "
            "always 1, so its router would not be trained"
        )
    heads = config["num_attention_heads"]
    theta, factor = _rope(config, folder)
    generation = folder / "generation_config.json"
    eos = (json.loads(generation.read_text()) if generation.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return HFModel(
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_size=config["moe_intermediate_size" if kind.experts else "intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
        num_experts=(config.get("num_experts") or config["num_local_experts"]) if kind.experts else 0,
        experts_per_token=config["num_experts_per_tok"] if kind.experts else 0,
        renormalize_experts=kind.experts and config["norm_topk_prob"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_factor=factor,
        max_positions=config["max_position_embeddings"],
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _rope(config: Mapping[str, Any], folder: Path) -> tuple[float, float | None]:
    """Base and, for Llama 3's scaling, factor. Both spellings of config.json (before and since transformers 5) are read."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind == "llama3" and fixed == (1.0, 4.0, 8192):
        return theta, float(rope["factor"])
    raise ValueError(
        f"model.path={folder}: rope scaling {rope} is not supported; supported: none, and llama3 with factors 1, 4, 8192"
    )


class CheckpointReader:
    """Slices of the tensors of a safetensors checkpoint, read lazily (memory-mapped)."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(f"model.path={folder} has no model.safetensors; convert the checkpoint to safetensors first")
        self._folder = folder
        self._files: dict[str, Any] = {}

    def read(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """name[start : start + size] along `dim`. ValueError names a missing tensor and the folder."""
        if name not in self._file_of:
            raise ValueError(f"checkpoint {self._folder} has no tensor {name!r}; is config.json of the same model?")
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        whole = self._files[file].get_slice(name)
        return whole[start : start + size] if dim == 0 else whole[:, start : start + size]


def write_shard(folder: Path, number: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write one safetensors file of a checkpoint; returns its name."""
    name = f"model-{number:05d}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    return name


def finish_checkpoint(folder: Path, source: Path, weight_map: Mapping[str, str], total_bytes: int, dtype: str) -> None:
    """Write the index and copy configuration and tokenizer of `source`; the stored dtype is corrected in config.json."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file in _side_files(source):
        shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _side_files(source: Path) -> Iterable[Path]:
    """Everything but weights: configuration, generation defaults, tokenizer, chat template, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in {".json", ".jinja", ".txt", ".model"} and not file.name.endswith(".index.json"):
            yield file


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place, so that readers see the old or the new one, whole."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
