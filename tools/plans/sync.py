"""`plan.py sync`: the plan of a weight push: which bytes go over which link."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.sync.chunks import manifest_bytes
from megatron_dapo.sync.fp8_blocks import block_holdings
from megatron_dapo.sync.plan import Plan, Worker, make_plan
from megatron_dapo.sync.plan_report import H100, LINKS, Bandwidths, report
from megatron_dapo.sync.sinks import SinkTable
from megatron_dapo.sync.sources import Holdings, holdings
from megatron_dapo.weights.block_fp8 import (
    Shapes,
    checkpoint_facts,
    linear_weights,
    quantization_config,
    scale_shapes,
)
from megatron_dapo.weights.hf import DTYPES
from megatron_dapo.weights.names import hf_shapes
from plans.models import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-hosts", type=int, default=0, help="hosts of engines alone; 0: colocated")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="ranks of a host (default 8)")
    for link in LINKS:
        parser.add_argument(
            f"--{link.replace('_', '-')}",
            type=float,
            default=getattr(H100, link) / 1e9,
            metavar="GB/s",
            help="of one rank or worker, one direction (default %(default)g, H100)",
        )


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The report of one push, for JSON, with the seconds that planning took."""
    config = RunConfig.load(options.config, options.overrides)
    layout = config.layout.to_layout()
    with model_folder(config.model.path) as folder:
        model = read_model(folder)
        layout.check_model(**layout_sizes(model))
        begin = time.perf_counter()
        tables = engine_tables(config, folder, model)
    tabled = time.perf_counter()
    push = plan_push(config, model, tables, options.gpus_per_host, options.engine_hosts)
    bandwidths = Bandwidths(**{link: getattr(options, link) * 1e9 for link in LINKS})
    planned = time.perf_counter()
    return {
        "config": str(options.config),
        "model": config.model.path,
        "layout": layout.describe(),
        "engine_tensor_parallel": config.rollout.tensor_parallel,
        "colocated": not options.engine_hosts,
        "chunk_bytes": config.sync.chunk_bytes,
        **report(push, bandwidths),
        "manifest_bytes": manifest_bytes(push, dtype_name(config)),
        "planning_seconds": {"sink_tables": tabled - begin, "plan": planned - tabled},
    }


def plan_push(
    config: RunConfig, model: ModelSpec, tables: Sequence[SinkTable], gpus_per_host: int, engine_hosts: int
) -> Plan:
    """Of a run with gpus_per_host ranks on each host, and engines with these tables beside them, or on so
    many other hosts.
    """
    layout = config.layout.to_layout()
    rank_hosts = [f"host {rank // gpus_per_host}" for rank in range(layout.world_size)]
    return make_plan(
        place_workers(config, tables, rank_hosts, engine_hosts),
        held_by_ranks(config, model, layout),
        rank_hosts,
        chunk_bytes=config.sync.chunk_bytes,
        dtype=dtype_name(config),
    )


def held_by_ranks(config: RunConfig, model: ModelSpec, layout: Layout) -> Holdings:
    return block_holdings(holdings(model, layout), weights_in_fp8(config, model))


def dtype_name(config: RunConfig) -> str:
    return str(DTYPES[config.model.dtype]).removeprefix("torch.")


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
