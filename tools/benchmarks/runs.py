"""What benchmarks of whole runs share: a small model with random weights, its problems, a run and its
metrics.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.config import RunConfig
from megatron_dapo.train import launch

TOOLS = Path(__file__).parents[1]
WARM_UP = 2  # first steps of a run: caches, lazily built kernels
Line = Mapping[str, float]  # of metrics.jsonl


def make_model(
    folder: Path,
    *,
    tokens: int | None = None,
    ends: bool = False,
    longest: int = 1024,
    sizes: Mapping[str, int] | None = None,
) -> int:
    """The model of examples/make_tiny_base.py with random weights; returns its number of parameters.

    tokens: size of the vocabulary; then the logit of the end of sequence is 0 and the others are near 0, so
    its chance is about 1 / `tokens` at each token. Default: the example's. ends: whether the end of sequence
    is one; if not, every response has its full length. longest: tokens that a sequence may have. sizes: other
    than the example's, by their names in the model's config.json.
    """
    sys.path.insert(0, str(TOOLS.parent / "examples"))
    import make_tiny_base  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    tokenizer = make_tiny_base.make_tokenizer()
    if tokens is not None:
        tokenizer.add_tokens([f"<|more_{i}|>" for i in range(tokens - len(tokenizer))])
    model = make_tiny_base.make_model(tokenizer)
    if sizes is not None:
        model.config.update({**sizes, "layer_types": ["full_attention"] * sizes["num_hidden_layers"]})
        model = type(model)(model.config)
    if tokens is not None:
        with torch.no_grad():
            rows = model.get_input_embeddings().weight  # tied: of the output layer too
            rows[tokenizer.eos_token_id] = 0
    model.config.max_position_embeddings = longest
    if not ends:
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_problems(file: Path) -> None:
    """Sums of two numbers, one to a line."""
    rows = (
        {"prompt": f"What is {a}+{b}?\n", "answer": str(a + b)} for a in range(10, 99) for b in range(10, 99)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_config(
    folder: Path, *, model: str, name: str, settings: Mapping[str, Any], overrides: Sequence[str]
) -> RunConfig:
    """Of a run of 32 prompts x 8 samples, two data-parallel ranks and one server. `folder` has the model and
    data.jsonl.
    """
    base = {
        "model.path": folder / model,
        "model.dtype": "fp32",
        "layout.data_parallel": 2,
        "rollout.max_tokens": 20,
        "sampling.prompts_per_step": 32,
        "sampling.samples_per_prompt": 8,
        "sampling.dynamic": "false",
        "sampling.max_age": 0,
        "reward.verifier": "bench:even_length",
        "data.path": folder / "data.jsonl",
        "data.max_prompt_tokens": 32,
        "batch.max_tokens": 4096,
        "checkpoint.export_hf": "false",
        "run.dir": folder / name,
    }
    pairs = [f"{key}={value}" for key, value in (base | dict(settings)).items()]
    return RunConfig.load(None, pairs + list(overrides))


def run(config: RunConfig) -> list[Line]:
    """Make the run; its metrics after the first steps. SystemExit if it fails or is stopped before them."""
    find_verifier()
    with quiet():
        status = launch(config)
    if status != 0:
        raise SystemExit(status)
    file = Path(config.run.dir) / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    measured = [line for line in lines if line["step"] > WARM_UP]
    if not measured:
        raise SystemExit(f"error: the run was stopped before step {WARM_UP + 1}, the first that is measured")
    return measured


def find_verifier() -> None:
    """Let the processes that are started from here import `bench` and this package."""
    paths = [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    if str(TOOLS) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


@contextmanager
def quiet() -> Iterator[None]:
    """What a run prints is dropped: stdout carries the benchmark's JSON only."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        stdout = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def medians(lines: Sequence[Line]) -> dict[str, float]:
    """Of everything that is timed, by step."""
    return {key: median(lines, key) for key in lines[0] if key.startswith("time/")}


def median(lines: Sequence[Line], key: str) -> float:
    return round(statistics.median(line[key] for line in lines), 4)
