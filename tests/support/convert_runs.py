"""Tiny checkpoints of every family, what Megatron saves of them at some layout, and what it loads of a
converted one, in one launch of four ranks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_dapo.convert import workers
from megatron_dapo.convert.job import Job
from megatron_dapo.convert.mapping import read_spec
from megatron_dapo.convert.safetensors_files import header
from megatron_dapo.weights.names import hf_shapes
from support.cases import PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks


@dataclass(frozen=True)
class Family:
    layout: str
    changes: dict[str, Any]
    vocabulary: int | None = None  # None: that of the tokenizer, which splits evenly


FAMILIES = {
    "odd_vocab": Family("tp2_pp2", {"arch": "qwen2", "tied": True}, 101),
    "experts": Family("tp2_sp_ep2_pp2", {"arch": "qwen3_moe"}),
    "interleaved": Family("pp2_vpp2", {"arch": "qwen3", "tied": True}),
    "qwen2_32b": Family("tp2_pp2", {"arch": "qwen2", "heads": 10, "kv_heads": 2, "hidden": 320}),
    "qwen2_72b": Family("tp2_pp2", {"arch": "qwen2", "heads": 16, "kv_heads": 2, "hidden": 512}),
    "qwen3": Family("tp2_pp2", {"arch": "qwen3"}),
    "llama": Family("tp2_pp2", {"arch": "llama"}, 103),
    "llama_tied": Family("tp2_pp2", {"arch": "llama", "tied": True}),
    "mistral": Family("tp2_pp2", {"arch": "mistral"}),
}

SPARSE_SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Measured:
    """models: the Hugging Face folders. converted: in Megatron's format, by our tool. saved: by Megatron,
    each a folder with torch_dist, singleton and legacy. loaded: exported from policies that loaded
    `converted`.
    """

    models: dict[str, Path]
    converted: dict[str, Path]
    saved: dict[str, Path]
    loaded: dict[str, Path]


def make(folder: Path, family: Family, seed: int) -> Path:
    sizes: dict[str, Any] = dict(layers=4, heads=8, kv_heads=4, hidden=128, ffn=96, seed=seed)
    make_tiny_model(folder, **(sizes | family.changes))
    if family.vocabulary:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.resize_token_embeddings(family.vocabulary)
        model.save_pretrained(folder)
    return folder


def measure(folder: Path, names: tuple[str, ...]) -> Measured:
    models = {name: make(folder / f"model-{name}", FAMILIES[name], 0) for name in names}
    others = {name: make(folder / f"other-{name}", FAMILIES[name], 1) for name in names}
    converted = {name: folder / f"converted-{name}" for name in names}
    for name, out in converted.items():
        job = Job(to="megatron", source=models[name], hf_source=models[name], out=out, shard_bytes=200_000)
        workers.convert(job, environment={})

    def runs(prefix: str, of: dict[str, Path]) -> list[PolicyRun]:
        return [
            PolicyRun(name=f"{prefix}-{name}", model=str(model), layout=FAMILIES[name].layout)
            for name, model in of.items()
        ]

    run_ranks(
        "support.jobs_convert:save_and_load",
        4,
        saved=runs("saved", models),
        loaded=runs("loaded", others),
        checkpoints={f"loaded-{name}": str(out / "release") for name, out in converted.items()},
        folder=str(folder),
        timeout_s=500,
    )
    return Measured(
        models=models,
        converted=converted,
        saved={name: folder / f"saved-{name}" for name in names},
        loaded={name: folder / f"loaded-{name}" for name in names},
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by the library's own reader."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def sparse_model(folder: Path, layers: int, vocab: int) -> Path:
    """A Llama of zeros whose file takes no room on the disk."""
    folder.mkdir()
    config = {**SPARSE_SIZES, "num_hidden_layers": layers, "vocab_size": vocab, "tie_word_embeddings": True}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (folder / "tokenizer.json").write_text("{}")
    shapes = hf_shapes(read_spec(folder))
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    begin = header({name: (shape, torch.bfloat16) for name, shape in shapes.items()})
    (folder / "model.safetensors").write_bytes(begin)
    os.truncate(folder / "model.safetensors", len(begin) + size)
    return folder
