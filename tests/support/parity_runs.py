"""The checkpoints and the one launch of four ranks behind the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.cases import PolicyRun
from support.models import make_tiny_model
from support.ranks import run_ranks

BUCKETS = (1, 100_000, 1 << 30)  # bytes: every tensor alone, a few together, all at once
MODELS = (
    *("qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied", "odd_vocab-tied", "odd_vocab-untied"),
    *("mistral-untied", "qwen3-tied", "qwen3_moe-untied"),
)
LAYOUTS = {name: ("tp1", "tp2_sp_ep2_pp2" if name.startswith("qwen3_moe") else "tp2_pp2") for name in MODELS}
CASES = [(name, layout) for name in MODELS for layout in LAYOUTS[name]]


@dataclass
class Measured:
    folder: Path
    models: dict[str, Path]
    by_rank: list[dict[str, list[float]]]  # logprobs_T of all samples end to end, by "model@layout"


def measure(folder: Path) -> Measured:
    models = {name: make(folder / f"model-{name}", *name.split("-")) for name in MODELS}
    runs = [
        PolicyRun(
            name=f"{name}@{layout}",
            model=str(model),
            layout=layout,
            overrides=["rollout.temperature=0.7"] if name == "llama-tied" else [],
        )
        for name, model in models.items()
        for layout in LAYOUTS[name]
    ]
    sizes = {run.name: BUCKETS[-1:] if run.layout == "tp1" else BUCKETS for run in runs}
    by_rank = run_ranks(
        "support.jobs_policy:logprobs_and_export",
        4,
        runs=runs,
        sizes=sizes,
        folder=str(folder),
        timeout_s=500,
    )
    return Measured(folder, models, by_rank)


def make(folder: Path, kind: str, ties: str) -> Path:
    arch: Any = "qwen2" if kind == "odd_vocab" else kind
    make_tiny_model(folder, arch=arch, tied=ties == "tied", layers=4, heads=8, kv_heads=4, hidden=128, ffn=96)
    if kind == "odd_vocab":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.resize_token_embeddings(101)
        model.save_pretrained(folder)
    return folder
