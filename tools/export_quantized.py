#!/usr/bin/env python
"""Quantise a trained model for servers, on a CPU, calibrated on the run's own rollouts.

    python tools/export_quantized.py --model RUN/hf --scheme fp8 --calibrate RUN/rollouts --out DIR
    python tools/export_quantized.py --model RUN --hf-source MODEL --scheme fp8_block --out DIR

--model is a Hugging Face folder or any checkpoint that tools/convert_checkpoint.py reads. Schemes:

    fp8        weights and activations in float8 with a scale for each tensor (ModelOpt)
    fp8_block  a scale for each block of 128 x 128 (DeepSeek's format); needs no calibration
    nvfp4      4-bit floats with a scale for 16 values, for Blackwell (ModelOpt)
    int4_awq   4-bit integers with a scale for 128 values, AWQ (ModelOpt's, in compressed-tensors' format)

The error of each weight is printed, and what the rounding does to the next token's distribution.
Exit status: 0 done; 2 a wrong argument, file or disk, in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from convert_checkpoint import hf_folder

from megatron_dapo.convert.logit_gap import Rollout
from megatron_dapo.convert.quantized import NEEDS_GPU, SCHEMES, Quantisation, Result, export_quantised
from megatron_dapo.errors import UserError
from megatron_dapo.report.rollouts import load_groups

T = TypeVar("T")


def read_rollouts(paths: Sequence[Path], samples: int, max_tokens: int) -> list[Rollout]:
    """`samples` rollouts, spread over the files and within each, cut after `max_tokens`. A path may be a
    folder of rollout files.
    """
    files = [
        file for path in paths for file in (sorted(path.glob("step_*.parquet")) if path.is_dir() else [path])
    ]
    if not files:
        raise UserError(f"--calibrate {paths[0]} holds no step_*.parquet; report.rollouts=true writes them")
    found = []
    for file in spread(files, samples):
        found += spread(read_file(file, max_tokens), samples)
    if not found:
        raise UserError(
            f"--calibrate {paths[0]} holds no response that begins within --max-tokens {max_tokens}; raise it"
        )
    return spread(found, samples)


def read_file(file: Path, max_tokens: int) -> list[Rollout]:
    """Without those whose prompt alone has so many tokens."""
    found = []
    for group in load_groups(file)[0]:
        prompt = group.prompt.tokens
        for completion in group.completions:
            tokens = (*prompt, *completion.tokens[:max_tokens].tolist())[:max_tokens]
            if len(tokens) > len(prompt) > 0:
                found.append(Rollout(tokens, len(prompt)))
    return found


def spread(items: list[T], number: int) -> list[T]:
    """At most so many of them, at equal distances."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def as_json(result: Result) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "scheme": result.scheme,
        "bytes_bf16": result.num_bytes[0],
        "bytes": result.num_bytes[1],
        "kl": result.kl,
        "kl_tokens": result.num_tokens,
        "errors": [
            {"name": error.name, "relative": error.relative, "largest": error.largest}
            for error in result.errors
        ],
    }


def as_text(result: Result) -> str:
    width = max(len(error.name) for error in result.errors)
    lines = [f"{'weight':{width}}  relative    largest"]
    lines += [f"{e.name:{width}}  {e.relative:.6f}  {e.largest:.3e}" for e in result.errors]
    before, after = result.num_bytes
    lines.append(f"{result.out}: {after / 1e9:.3f} GB of weights, {before / 1e9:.3f} GB in bf16")
    if result.kl is not None:
        lines.append(f"kl {result.kl:.3e} nats a token, over {result.num_tokens} tokens of responses")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder of a model, a run or a step, or a hub name")
    parser.add_argument(
        "--hf-source", help="the model's config.json and tokenizer, for a Megatron checkpoint"
    )
    parser.add_argument("--scheme", required=True, choices=[*SCHEMES, *NEEDS_GPU])
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", default=[], help="rollout files, or folders of them"
    )
    parser.add_argument("--samples", type=int, default=64, help="rollouts to calibrate on (default 64)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of each of them (default 1024)")
    parser.add_argument("--out", type=Path, required=True, help="new folder; nothing is overwritten")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for name in ("samples", "max_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    return options


def export(options: argparse.Namespace) -> Result:
    rollouts = []
    if options.calibrate:
        rollouts = read_rollouts(options.calibrate, options.samples, options.max_tokens)
    job = Quantisation(
        source=hf_folder("--model", options.model).resolve(),
        hf_source=hf_folder("--hf-source", options.hf_source) if options.hf_source else None,
        out=options.out.resolve(),
        scheme=options.scheme,
    )
    return export_quantised(job, rollouts, lambda text: print(text, file=sys.stderr))


def main(arguments: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    options = parse(arguments)
    try:
        result = export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(result), indent=1) if options.json else as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
