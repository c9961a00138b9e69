#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron, look into them, compare them. No GPU is needed.

    python tools/convert_checkpoint.py hf-to-megatron --hf MODEL --out DIR [--dtype bf16] [--workers 4]
    python tools/convert_checkpoint.py megatron-to-hf --megatron RUN --hf-source MODEL --out DIR
    python tools/convert_checkpoint.py inspect PATH [--json]
    python tools/convert_checkpoint.py verify A B [--json] [--workers 4]

RUN, PATH, A and B may be a folder of weights, of a step or of a whole run (its newest step): of this project,
of Megatron-LM (torch_dist, or mp_rank_* folders), verl, slime or NeMo-RL. Values are read and written a few
rows at a time. A conversion that was killed goes on where it was when the same command is given again. Under
torchrun, also on several hosts with a common file system, ranks share the work:

    torchrun --nnodes 4 --nproc-per-node 2 ... tools/convert_checkpoint.py megatron-to-hf ...

Exit status: 0 done, or equal; 1 the two checkpoints differ; 2 a wrong argument, file or disk, in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dapo.convert import compare, describe, workers
from megatron_dapo.convert.job import SHARD_BYTES, Job
from megatron_dapo.convert.outputs import DTYPES
from megatron_dapo.errors import UserError
from megatron_dapo.weights.hf import resolve_folder


def convert(options: argparse.Namespace) -> int:
    if options.command == "megatron-to-hf":
        to, model, source = "hf", hf_folder("--hf-source", options.hf_source), options.megatron
    else:
        to, model = "megatron", hf_folder("--hf", options.hf)
        source = model
    job = Job(
        to=to,
        source=source.resolve(),
        hf_source=model.resolve(),
        out=options.out.resolve(),
        dtype=options.dtype,
        shard_bytes=options.shard_bytes,
        allow_nan=options.allow_nan,
    )
    result = workers.convert(job, options.workers)
    if result is not None:
        nan = f", NaN in {len(result['nan'])} tensors" if result["nan"] else ""
        print(f"{result['out']}: {result['files']} files, {result['bytes'] / 1e9:.3f} GB of weights{nan}")
    return 0


def hf_folder(option: str, value: str) -> Path:
    try:
        return resolve_folder(value)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", f"{option} ", 1)) from error


def inspect(options: argparse.Namespace) -> int:
    facts = describe.describe(options.path)
    print(json.dumps(facts, indent=1) if options.json else describe.as_text(facts))
    return 0


def verify(options: argparse.Namespace) -> int:
    model = hf_folder("--hf-source", options.hf_source) if options.hf_source else None
    result = compare.compare(options.a, options.b, model, options.workers)
    print(json.dumps(compare.as_json(result), indent=1) if options.json else compare.as_text(result))
    return 0 if result.equal else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder to Megatron torch_dist")
    to_megatron.add_argument("--hf", required=True, help="folder or hub name")
    to_hf = commands.add_parser("megatron-to-hf", help="Megatron checkpoint to Hugging Face safetensors")
    to_hf.add_argument("--megatron", type=Path, required=True, help="folder of weights, step or run")
    to_hf.add_argument("--hf-source", required=True, help="the model's config.json and tokenizer")
    for command in (to_megatron, to_hf):
        command.add_argument("--out", type=Path, required=True, help="new folder; nothing is overwritten")
        command.add_argument("--dtype", choices=list(DTYPES), help="of all tensors (default: as they are)")
        command.add_argument(
            "--shard-bytes",
            type=int,
            default=SHARD_BYTES,
            help=f"of an output file, but for a larger tensor (default {SHARD_BYTES})",
        )
        command.add_argument("--allow-nan", action="store_true", help="convert weights that are NaN, too")
        command.set_defaults(run=convert)
    look = commands.add_parser("inspect", help="format, model, layout, parameters, step, sizes")
    look.add_argument("path", type=Path)
    look.set_defaults(run=inspect)
    both = commands.add_parser("verify", help="equal in every bit, or the largest difference by tensor")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    both.add_argument("--hf-source", help="the model, if neither checkpoint tells")
    both.set_defaults(run=verify)
    for command in (look, both):
        command.add_argument("--json", action="store_true")
    for command in (to_megatron, to_hf, both):
        command.add_argument("--workers", type=int, default=1, help="processes on this host (default 1)")
    options = parser.parse_args(arguments)
    for name in ("workers", "shard_bytes"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    options = parse(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
