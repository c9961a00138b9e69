#!/usr/bin/env python
"""Plan what a run will do before renting the machine.

    python tools/plan.py sync --config examples/configs/qwen32b.yaml [section.key=value ...] [--json]
    python tools/plan.py sync --config examples/configs/qwen32b_async.yaml --engine-hosts 12
    python tools/plan.py memory --config examples/configs/qwen32b.yaml [--gpu H100] [--json] [--plot OUT.png]
    python tools/plan.py layouts --model Qwen/Qwen2.5-32B --gpus 128 [--config CONFIG.yaml] [--json]

`sync`: the plan of a weight push (megatron_dapo/sync/plan.py): which bytes go over which link, what each rank
sends and each engine worker receives, and the seconds that this takes at the stated bandwidths (planned, not
measured). `rollout.engines` counts the engines of each host. They are on the hosts of the policy's ranks
(colocated), or on --engine-hosts other hosts (disaggregated). `--json` prints one object with every number.

What engines need is recorded from vLLM's own loaders on the meta device.

`memory`: what lies in the GPUs' memory in each phase of a step, for every kind of rank, whether it fits, and
seconds of the phases (megatron_dapo/planning/). `layouts`: a search over layouts, recomputation, micro-batch
and engines, ranked by the estimated step. Assumptions and validation: docs/planning.md.

Neither weights nor the network are needed: if model.path is no folder here, tools/model_configs/ has the
config.json of the shipped configurations' models.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plans import layouts, memory
from plans.models import model_folder

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.sync.chunks import manifest_bytes
from megatron_dapo.sync.fp8_blocks import block_holdings
from megatron_dapo.sync.plan import Worker, make_plan
from megatron_dapo.sync.plan_report import H100, LINKS, Bandwidths, report
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import holdings
from megatron_dapo.weights.block_fp8 import (
    Shapes,
    checkpoint_facts,
    linear_weights,
    quantization_config,
    scale_shapes,
)
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes

# --- sync -------------------------------------------------------------------------------


def plan_sync(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one push of this configuration, with the seconds that planning took."""
    layout = config.layout.to_layout()
    with model_folder(config.model.path) as folder:
        model = read_model(folder)
        layout.check_model(**layout_sizes(model))
        begin = time.perf_counter()
        tables = engine_tables(config, folder, model)
    tabled = time.perf_counter()
    rank_hosts = [f"host {rank // options.gpus_per_host}" for rank in range(layout.world_size)]
    workers = place_workers(config, tables, rank_hosts, options.engine_hosts)
    ready, dtype = time.perf_counter(), str(DTYPES[config.model.dtype]).removeprefix("torch.")
    plan = make_plan(
        workers,
        block_holdings(holdings(model, layout), weights_in_fp8(config, model)),
        rank_hosts,
        chunk_bytes=config.sync.chunk_bytes,
        dtype=dtype,
    )
    planned = time.perf_counter()
    bandwidths = Bandwidths(**{link: getattr(options, link) * 1e9 for link in LINKS})
    return {
        "config": str(options.config),
        "model": config.model.path,
        "layout": layout.describe(),
        "engine_tensor_parallel": config.rollout.tensor_parallel,
        "colocated": not options.engine_hosts,
        "chunk_bytes": config.sync.chunk_bytes,
        **report(plan, bandwidths),
        "manifest_bytes": manifest_bytes(plan, dtype),
        "planning_seconds": {"sink_tables": tabled - begin, "plan": planned - ready},
    }


def layout_sizes(model: ModelSpec) -> dict[str, int]:
    names = ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "ffn_size", "num_experts")
    return {name: getattr(model, name) for name in names}


def engine_tables(config: RunConfig, folder: Path, model: ModelSpec) -> list[SinkTable]:
    """The sink tables of one engine's workers, by rank, from vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from megatron_dapo.sync.vllm.sinks_pretend import engine_config, tables_without_engine

    engine = engine_config(
        folder,
        tp=config.rollout.tensor_parallel,
        dtype="bfloat16" if config.model.dtype == "bf16" else "float32",
        quantization=quantization_config(hf_shapes(model)) if config.rollout.quantization else None,
    )
    shapes = {**hf_shapes(model), **scale_shapes(weights_in_fp8(config, model))}
    return tables_without_engine(engine, checkpoint_facts(shapes, DTYPES[config.model.dtype]))


def weights_in_fp8(config: RunConfig, model: ModelSpec) -> Shapes:
    """The tensors that engines hold in block FP8."""
    return linear_weights(hf_shapes(model)) if config.rollout.quantization else {}


def place_workers(
    config: RunConfig, tables: Sequence[SinkTable], rank_hosts: Sequence[str], engine_hosts: int
) -> list[Worker]:
    """rollout.engines on each host of the policy, or on each of `engine_hosts` others."""
    hosts = [f"engine host {n}" for n in range(engine_hosts)] or list(dict.fromkeys(rank_hosts))
    return [
        Worker(
            engine=f"{host}, engine {number}",
            rank=rank,
            host=host,
            device=number * len(tables) + rank,
            table=table,
        )
        for host in hosts
        for number in range(config.rollout.engines)
        for rank, table in enumerate(tables)
    ]


def as_text(result: dict[str, Any]) -> str:
    """The report for people: a few lines and a table."""
    total, seconds = result["bytes"]["total"], result["seconds"]
    place = "on the policy's hosts" if result["colocated"] else "on hosts of their own"
    sent, received = result["sent_by_rank"], result["received_by_worker"]
    lines = [
        f"{result['model']}: policy {result['layout']} = {result['ranks']} ranks; engines "
        f"{result['engines']} x tp{result['engine_tensor_parallel']} = {result['workers']} workers, {place}; "
        f"hosts {result['hosts']}",
        f"{'link':<16}{'GB':>12}{'share':>8}{'GB/s':>8}{'seconds':>10}",
    ]
    for link in LINKS:
        size = result["bytes"][link]
        lines.append(
            f"{link.replace('_', ' '):<16}{size / 1e9:>12,.3f}{size / total:>8.1%}"
            f"{result['bandwidths'][link] / 1e9:>8,.0f}{seconds[link]:>10.3f}"
        )
    lines += [
        f"a push takes {seconds['push']:.3f} s if links run at these bandwidths (planned, not measured): "
        f"{result['rounds']} rounds of chunks of at most {result['chunk_bytes'] / 2**20:,.0f} MiB, "
        f"{result['messages']:,} messages",
        f"a rank sends {sent['min'] / 1e9:.3f} to {sent['max'] / 1e9:.3f} GB, mean {sent['mean'] / 1e9:.3f} "
        f"(largest {sent['max_over_mean']:.3f} x the mean)",
        f"a worker receives {received['min'] / 1e9:.3f} to {received['max'] / 1e9:.3f} GB, "
        f"{result['ratio_bytes']:.3f} x its shard",
        f"engines are told {result['manifest_bytes']['first_push'] / 1e6:.1f} MB in the first push, "
        f"{result['manifest_bytes']['later_pushes'] / 1e6:.1f} MB in each later one",
        f"planned in {result['planning_seconds']['plan']:.2f} s, after "
        f"{result['planning_seconds']['sink_tables']:.1f} s for vLLM's sink tables; digest "
        f"{result['digest'][:16]}",
    ]
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser(
        "sync",
        usage="%(prog)s --config CONFIG.yaml [section.key=value ...] [options]",
        allow_abbrev=False,
        help="a weight push",
    )
    sync.add_argument("--config", type=Path, required=True, metavar="CONFIG.yaml")
    sync.add_argument("--json", action="store_true", help="print one JSON object")
    sync.add_argument("--engine-hosts", type=int, default=0, help="hosts of engines alone; 0: colocated")
    sync.add_argument("--gpus-per-host", type=int, default=8, help="ranks of a host (default 8)")
    for link in LINKS:
        sync.add_argument(
            f"--{link.replace('_', '-')}",
            type=float,
            default=getattr(H100, link) / 1e9,
            metavar="GB/s",
            help="of one rank or worker, one direction (default %(default)g, H100)",
        )
    of_memory = commands.add_parser(
        "memory",
        usage="%(prog)s --config CONFIG.yaml [section.key=value ...] [options]",
        allow_abbrev=False,
        help="memory of the GPUs over a step",
    )
    of_memory.add_argument("--config", type=Path, required=True, metavar="CONFIG.yaml")
    of_memory.add_argument("--json", action="store_true", help="print one JSON object")
    of_memory.add_argument("--engine-hosts", type=int, default=1, help="hosts of engines, if not colocated")
    memory.add_arguments(of_memory)
    of_layouts = commands.add_parser(
        "layouts",
        usage="%(prog)s --model NAME --gpus N [--config CONFIG.yaml] [section.key=value ...] [options]",
        allow_abbrev=False,
        help="layouts that fit",
    )
    of_layouts.add_argument("--config", type=Path, metavar="CONFIG.yaml")
    of_layouts.add_argument("--json", action="store_true", help="print one JSON object")
    layouts.add_arguments(of_layouts)
    options, options.overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in options.overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"{wrong[0]} is neither an option nor of the form section.key=value")
    for name, least in (("engine_hosts", 0), ("gpus_per_host", 1), ("gpus", 1), ("best", 1)):
        if (value := getattr(options, name, least)) < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if getattr(options, "plot", None) and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot} must end in .png")
    if options.command == "layouts" and not (options.model or options.config):
        parser.error("layouts needs --model or --config")
    for link in LINKS if options.command == "sync" else ():
        if not getattr(options, link) > 0:
            parser.error(f"--{link.replace('_', '-')} {getattr(options, link)} must be above 0 GB/s")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "layouts":
            result, text = layouts.plan(options), layouts.as_text
        else:
            config = RunConfig.load(options.config, options.overrides)
            is_sync = options.command == "sync"
            result = plan_sync(config, options) if is_sync else memory.plan(config, options)
            text = as_text if is_sync else memory.as_text
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
