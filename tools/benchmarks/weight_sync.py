"""`bench.py weight-sync`: weight pushes into one real vLLM server (see tools/bench.py)."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import TOOLS, find_verifier, quiet, run_config
from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.train import start_ranks
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes

EXTENSION = "benchmarks.weight_sync_worker.BenchmarkExtension"
LAYOUT = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline_parallel",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "dp": "data_parallel",
}
BASELINE = ("seconds", "repack_seconds", "bytes_received_per_worker")  # what is printed of one
# By --config: a file of tools/model_configs, and in what the model differs from it. The sizes are those of
# Qwen2.5-1.5B and Qwen2.5-0.5B.
_SMALL = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny_base.json", {}),
    "qwen2.5-0.5b-like": (
        "Qwen2.5-32B.json",
        {**_SMALL, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
        | {"num_hidden_layers": 24, "max_window_layers": 24},
    ),
    "qwen2.5-1.5b-like": (
        "Qwen2.5-32B.json",
        {**_SMALL, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
        | {"num_hidden_layers": 28, "max_window_layers": 28},
    ),
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.pushes < 2:
        raise SystemExit(f"error: --pushes {options.pushes} must be at least 2: the first is not measured")
    baselines = [*dict.fromkeys(options.baseline), *(["delta"] if options.delta else [])]
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        if options.model is None:
            make_folder(folder / "model", options.config)
        model = (options.model or folder / "model").resolve()
        try:
            config = make_config(folder, model, options)
            facts = preflight.check_training(config)
            preflight.engines_split_the_heads(facts)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        (folder / "config.yaml").write_text(config.dump())
        out = folder / "measured.json"
        find_verifier()
        arguments = [str(folder / "config.yaml"), str(options.pushes), ",".join(baselines), str(out)]
        with quiet():
            status = start_ranks(config, ["-m", "benchmarks.weight_sync_ranks", *arguments])
        if status != 0:
            raise SystemExit(status)
        elements = sum(map(math.prod, hf_shapes(facts.spec).values()))
        return report(json.loads(out.read_text()), elements * DTYPES[options.dtype].itemsize)


def make_folder(folder: Path, name: str) -> None:
    """A model of CONFIGS without weights. Its tokenizer is only there because a model has one."""
    sys.path.insert(0, str(TOOLS.parent / "examples"))
    import make_tiny_base  # pyright: ignore[reportMissingImports]

    file, sizes = CONFIGS[name]
    config = json.loads((TOOLS / "model_configs" / file).read_text()) | sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    make_tiny_base.make_tokenizer().save_pretrained(folder)


def make_config(folder: Path, model: Path, options: argparse.Namespace) -> RunConfig:
    """Of a run with these ranks and one server, which starts with weights that mean nothing. UserError for a
    layout that cannot be.
    """
    trainer = sizes_of("--trainer", options.trainer, LAYOUT)
    engine = sizes_of("--engine", options.engine, {"tp": "tensor_parallel"})
    server = ["--load-format", "dummy", "--worker-extension-cls", EXTENSION]
    settings = {
        "model.dtype": options.dtype,
        "layout.data_parallel": 1,
        **{f"layout.{key}": size for key, size in trainer.items()},
        **{f"rollout.{key}": size for key, size in engine.items()},
        "rollout.max_concurrency": 8,
        "rollout.progress_timeout_s": 600,
        "rollout.start_timeout_s": 1200,
        "rollout.extra_args": server,
        "report.rollouts": "false",
    }
    return run_config(folder, model=str(model), name="run", settings=settings, overrides=options.overrides)


def sizes_of(option: str, text: str, names: Mapping[str, str]) -> dict[str, int]:
    """`tp2,pp2` as sizes by the names of the configuration."""
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"([a-z]+)([1-9][0-9]*)", part)
        if not found or found[1] not in names:
            raise UserError(
                f"{option} {text}: {part!r} must be one of {', '.join(names)} and a size, such as tp2"
            )
        sizes[names[found[1]]] = int(found[2])
    return sizes


def report(measured: Mapping[str, Any], model_bytes: int) -> dict[str, Any]:
    """What is printed, of what the ranks have measured (weight_sync_ranks.py)."""
    ours = _summary(measured["pushes"])
    received, least = ours["bytes_received_per_worker"], measured["lower_bound_bytes"]
    memcpy_seconds = sum(received) / (measured["memcpy_gbps"] * 1e9)
    baseline = {}
    for name, pushes in measured["baselines"].items():
        other = _summary(pushes)
        baseline[name] = {key: other[key] for key in BASELINE}
    return {
        "model_bytes": model_bytes,
        "bytes_received_per_worker": received,
        "lower_bound_bytes": least,
        "ratio_bytes": round(max(a / b for a, b in zip(received, least, strict=True)), 4),
        "seconds": ours["seconds"],
        "memcpy_gbps": round(measured["memcpy_gbps"], 2),
        "seconds_over_memcpy": round(ours["seconds"] / memcpy_seconds, 3),
        "repack_seconds": ours["repack_seconds"],
        "kernel_copy_seconds": ours["kernel_copy_seconds"],
        "without_repack_over_memcpy": round((ours["seconds"] - ours["repack_seconds"]) / memcpy_seconds, 3),
        "peak_extra_bytes_sender": measured["peak_extra_bytes_sender"],
        "peak_extra_bytes_receiver": ours["peak_extra_bytes"],
        "baseline": baseline,
        "baseline_over_ours": {
            name: round(of_other["seconds"] / ours["seconds"], 3) for name, of_other in baseline.items()
        },
        **({"delta": _delta(measured["delta"])} if "delta" in measured else {}),
        "cores": os.cpu_count(),
    }


def _delta(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes between hosts are of the pushes after the first, which sends everything either way."""
    sent = {way: of_way["sent_bytes"] for way, of_way in measured.items()}
    count = len(measured["with"]["pushes"])
    whole = sent["without"] / count
    return {
        "seconds": _summary(measured["with"]["pushes"])["seconds"],
        "seconds_without": _summary(measured["without"]["pushes"])["seconds"],
        "bytes_between_hosts": round((sent["with"] - whole) / (count - 1)),
        "bytes_between_hosts_without": round(whole),
    }


def _summary(pushes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the pushes after the first: medians of the seconds, by push those of the slowest worker; the highest
    peak.
    """
    later = pushes[1:]
    return {
        "seconds": round(statistics.median(push["seconds"] for push in later), 4),
        "bytes_received_per_worker": later[-1]["received"],
        **{
            key: round(statistics.median(max(worker[key] for worker in push["workers"]) for push in later), 4)
            for key in ("repack_seconds", "kernel_copy_seconds")
        },
        "peak_extra_bytes": max(worker["peak_extra_bytes"] for push in later for worker in push["workers"]),
    }
