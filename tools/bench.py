#!/usr/bin/env python
"""Benchmarks that print JSON.

    python tools/bench.py step [--steps 8] [section.key=value ...]
    python tools/bench.py packing --lengths lengths.json [--budget 22528] [--ranks 128]

`step`: whole training steps (collect, grade, update, sync) of a 3M-parameter model with random weights: 32 prompts x 8 samples of
20 tokens, 2 data-parallel ranks, one vLLM server. Seconds are medians over the steps after the first two.

`packing`: plans one optimizer update on samples of the given lengths (a JSON list, tokens) with the cost of Qwen2.5-32B.
imbalance: cost of the costliest rank over the mean one; fill: tokens over the budgets of all micro-batches; lower_bound: micro-batches
if the budgets of every rank could be filled to the last token, which few lengths allow; seconds: planning only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_dapo.algo.packing import Cost, plan
from megatron_dapo.config import RunConfig
from megatron_dapo.train import launch

QWEN32B = Cost.of_model(  # Qwen2.5-32B
    num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, head_dim=128, ffn_size=27648, vocab_size=152064
)
WARM_UP = 2  # first steps: caches, lazily built kernels


def even_length(response: str, answer: str) -> bool:
    """A verifier that random weights satisfy about half the time."""
    return sum(map(ord, response)) % 2 == 0


def step(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="megatron_dapo_bench_") as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        rows = [{"prompt": f"What is {a}+{b}?\n", "answer": str(a + b)} for a in range(10, 99) for b in range(10, 99)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        settings = {
            "model.path": folder / "model",
            "model.dtype": "fp32",
            "layout.data_parallel": 2,
            "rollout.max_tokens": 20,
            "sampling.prompts_per_step": 32,
            "sampling.samples_per_prompt": 8,
            "sampling.dynamic": "false",
            "reward.verifier": "bench:even_length",
            "data.path": folder / "data.jsonl",
            "data.max_prompt_tokens": 32,
            "batch.max_tokens": 4096,
            "checkpoint.export_hf": "false",
            "run.dir": folder / "run",
            "run.max_steps": options.steps + WARM_UP,
        }
        config = RunConfig.load(None, [f"{key}={value}" for key, value in settings.items()] + options.overrides)
        with open(os.devnull, "w") as quiet:
            stdout = os.dup(1)
            os.dup2(quiet.fileno(), 1)  # the run's own lines; stdout carries the JSON only
            try:
                status = launch(config)
            finally:
                os.dup2(stdout, 1)
        if status != 0:
            raise SystemExit(status)
        lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["step"] > WARM_UP]
    medians = {key: round(statistics.median(line[key] for line in measured), 4) for key in measured[0] if key.startswith("time/")}
    return {
        **medians,
        "tokens_per_step": statistics.median(line["tokens/generated"] for line in measured),
        "steps": len(measured),
        "cores": os.cpu_count(),
    }


def packing(options: argparse.Namespace) -> dict[str, Any]:
    lengths = json.loads(options.lengths.read_text())
    if (longest := max(lengths)) > options.budget:
        raise SystemExit(f"error: --budget {options.budget} is below the longest sample ({longest} tokens); raise it")
    began = time.perf_counter()
    ranks = plan(lengths, dp=options.ranks, max_tokens=options.budget, cost=QWEN32B)
    seconds = time.perf_counter() - began
    costs = [sum(QWEN32B(lengths[i]) for micro in rank for i in micro) for rank in ranks]
    num_micro_batches = sum(len(rank) for rank in ranks)
    return {
        "imbalance": round(max(costs) / statistics.fmean(costs), 5),
        "fill": round(sum(lengths) / (num_micro_batches * options.budget), 5),
        "num_micro_batches": num_micro_batches,
        "lower_bound": options.ranks * math.ceil(sum(lengths) / (options.budget * options.ranks)),
        "seconds": round(seconds, 6),
    }


def make_model(folder: Path) -> None:
    """The model of examples/make_tiny_base.py with random weights, and no end of sequence: every response has its full length."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import make_tiny_base  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    tokenizer = make_tiny_base.make_tokenizer()
    model = make_tiny_base.make_model(tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    whole = commands.add_parser("step", help="whole training steps")
    whole.add_argument("--steps", type=int, default=8)
    whole.add_argument("overrides", nargs="*", metavar="section.key=value")
    whole.set_defaults(run=step)
    planning = commands.add_parser("packing", help="micro-batches for samples of given lengths")
    planning.add_argument("--lengths", type=Path, required=True, help="JSON list of sample lengths, tokens")
    planning.add_argument("--budget", type=int, default=22528, help="tokens of one micro-batch (batch.max_tokens)")
    planning.add_argument("--ranks", type=int, default=128, help="data-parallel ranks")
    planning.set_defaults(run=packing)
    options = parser.parse_args()
    print(json.dumps(options.run(options)))


if __name__ == "__main__":
    sys.exit(main())
