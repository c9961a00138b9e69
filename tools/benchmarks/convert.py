"""`bench.py convert`: tools/convert_checkpoint.py both ways, beside a plain copy (see tools/bench.py)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.resources import memory, reset_peak
from megatron_dapo.convert import workers
from megatron_dapo.convert.job import Job
from megatron_dapo.convert.mapping import read_spec
from megatron_dapo.convert.safetensors_files import header
from megatron_dapo.weights.names import hf_shapes

COPY_BYTES = 16 << 20
# Of Qwen2.5-1.5B; the number of layers follows from the size that is asked for.
SIZES = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
VOCABULARY = 151_936
LAYER_BYTES, EMBEDDING_BYTES = 93_600_768, 466_747_392


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = make_model(folder / "model", options.gigabytes)
        size = (model / "model.safetensors").stat().st_size
        times: dict[str, list[tuple[float, float]]] = {"copy": [], "hf_to_megatron": [], "megatron_to_hf": []}
        peaks = {"hf_to_megatron": 0, "megatron_to_hf": 0}

        def convert(way: str, source: Path) -> Path:
            to = "megatron" if way == "hf_to_megatron" else "hf"
            job = Job(to=to, source=source, hf_source=model, out=folder / way)
            before = reset_peak()
            times[way].append(timed(lambda: workers.convert(job, options.workers, environment={})))
            peaks[way] = max(peaks[way], memory("VmHWM") - before)
            return job.out

        for _ in range(options.repeats):
            times["copy"].append(timed(lambda: copy(model / "model.safetensors", folder / "copy")))
            (folder / "copy").unlink()
            converted = convert("hf_to_megatron", model)
            shutil.rmtree(convert("megatron_to_hf", converted))
            shutil.rmtree(converted)
    wall, cpu = ({way: statistics.median(t[k] for t in times[way]) for way in times} for k in (0, 1))
    return {
        "bytes": size,
        "workers": options.workers,
        **{f"{way}_seconds": round(wall[way], 3) for way in times},
        **{f"{way}_over_copy": round(wall[way] / wall["copy"], 3) for way in peaks},
        **{f"{way}_cpu_seconds": round(cpu[way], 3) for way in times},
        **{f"{way}_peak_extra_bytes": peak for way, peak in peaks.items()},
        "largest_tensor_bytes": EMBEDDING_BYTES,
    }


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and seconds of processor time of this process and its children."""
    before = os.times()
    work()
    after = os.times()
    return after[4] - before[4], sum(after[:4]) - sum(before[:4])


def copy(source: Path, target: Path) -> None:
    """The bytes through one buffer, and onto the disk."""
    buffer = memoryview(bytearray(COPY_BYTES))
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        while count := read.readinto(buffer):
            write.write(buffer[:count])
        os.fsync(write.fileno())


def make_model(folder: Path, gigabytes: float) -> Path:
    """A Qwen2 of random bf16 weights, about that large, in one file."""
    folder.mkdir()
    layers = max(1, round((gigabytes * 1e9 - EMBEDDING_BYTES) / LAYER_BYTES))
    config = {**SIZES, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
    config |= {"max_position_embeddings": 32768, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shapes = hf_shapes(read_spec(folder))
    noise = torch.randn(1 << 23).bfloat16().view(torch.uint8).numpy().data
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(header({name: (shape, torch.bfloat16) for name, shape in shapes.items()}))
        left = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
        while left:
            left -= stream.write(noise[: min(left, len(noise))])
        stream.flush()
        os.fsync(stream.fileno())
    return folder
