"""`plan.py run`: what a launch would be: ranks, engines, memory by phase, seconds by stage, bytes of a push
by link and on the disk. By formula alone, so it takes seconds and needs neither vLLM nor Megatron.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dapo import disk
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.planning.hardware import GPUS
from megatron_dapo.sync.plan_report import LINKS, report
from megatron_dapo.sync.regions import row_major
from megatron_dapo.sync.sinks import Sink, SinkTable
from megatron_dapo.weights.block_fp8 import SCALES
from plans import memory, sync


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nnodes", type=int, help="all hosts together; default: as many as have ranks")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of each host (default %(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="default %(default)s")


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a launch, for JSON. UserError when the layout is not of these hosts."""
    config = RunConfig.load(options.config, options.overrides)
    layout, rollout, gpu = config.layout.to_layout(), config.rollout, GPUS[options.gpu]
    policy_hosts, engine_hosts = hosts_of(config, layout, options.nnodes, options.gpus_per_node)
    on_cpu = config.run.device == "cpu"
    planned = memory.plan_run(
        config, gpu, engine_hosts=engine_hosts or policy_hosts, by_formula=True, on_cpu=on_cpu
    )
    tables = engine_tables(config, planned.model)
    push = sync.plan_push(config, planned.model, tables, options.gpus_per_node, engine_hosts)
    pushed = report(push, gpu.links)
    return {
        "config": str(options.config),
        "model": config.model.path,
        "gpu": gpu.name,
        "hosts": policy_hosts + engine_hosts,
        "engine_hosts": engine_hosts or policy_hosts,
        "ranks": layout.world_size,
        "layout": layout.describe(),
        "engines": planned.engines,
        "engine_tensor_parallel": rollout.tensor_parallel,
        "colocated": rollout.colocated,
        "memory": None if on_cpu else memory.facts(planned),
        "seconds": None if on_cpu else {"source": "estimate", **memory.seconds_of(planned.seconds)},
        "push": {key: pushed[key] for key in ("bytes", "bandwidths", "seconds", "ratio_bytes", "rounds")},
        "disk_bytes": disk_bytes(config, planned.model),
        "left_out": memory.left_out(config),
    }


def hosts_of(config: RunConfig, layout: Layout, nnodes: int | None, gpus: int) -> tuple[int, int]:
    """Hosts with ranks, and hosts of engines alone."""
    with_ranks = -(-layout.world_size // gpus)
    if nnodes is None:
        nnodes = with_ranks
        if not config.rollout.colocated:
            raise UserError(
                "rollout.colocated=false leaves open how many hosts serve engines; give all of them as "
                "--nnodes"
            )
    ranks = f"layout = {layout.describe()} has {layout.world_size} ranks"
    if config.rollout.colocated and with_ranks != nnodes:
        raise UserError(
            f"{ranks}, but --nnodes {nnodes} x --gpus-per-node {gpus} = {nnodes * gpus} GPUs; change "
            "layout.data_parallel or --nnodes"
        )
    if not config.rollout.colocated and with_ranks >= nnodes:
        raise UserError(
            f"{ranks} on {with_ranks} hosts, and --nnodes {nnodes} leaves none for the engines "
            "(rollout.colocated=false); raise it"
        )
    return with_ranks, nnodes - with_ranks


def engine_tables(config: RunConfig, model: ModelSpec) -> list[SinkTable]:
    """Of one engine's workers, without asking vLLM: each needs what a rank of a policy with the engine's
    tensor parallelism holds. Where in its parameters that goes does not matter here.
    """
    tp, in_fp8 = config.rollout.tensor_parallel, sync.weights_in_fp8(config, model)
    held = sync.held_by_ranks(config, model, Layout(tp=tp, etp=tp if model.num_experts else 1))

    def dtype(source: str) -> str:
        if source.endswith(SCALES):
            return "float32"
        return "float8_e4m3fn" if source in in_fp8 else sync.dtype_name(config)

    tables = []
    for rank in range(tp):
        boxes = [(name, part.box) for name, parts in held.items() for part in parts if rank in part.ranks]
        sinks = sorted(  # as vLLM's are
            Sink(f"{name}, from {box.start}", name, box.start, box.size, 0, row_major(box.size))
            for name, box in boxes
        )
        tables.append(
            SinkTable(
                tuple(sinks),
                dtypes={sink.parameter: dtype(sink.source) for sink in sinks},
                shapes={sink.parameter: sink.size for sink in sinks},
                tp=tp,
                tp_rank=rank,
            )
        )
    return tables


def disk_bytes(config: RunConfig, model: ModelSpec) -> dict[str, int]:
    """In run.dir: of a checkpoint, of an export, and of all that lies there while one more is being written,
    rollouts and logs left out.
    """
    options, dtype = config.checkpoint, config.model.dtype
    each = disk.checkpoint_bytes(model, dtype) * (2 if config.objective.kind == "ppo" else 1)
    export = disk.export_bytes(model, dtype)
    exports = int(options.export_hf) + ((options.keep_exports or 1) + 1 if options.export_every else 0)
    return {
        "checkpoint": each,
        "export": export,
        "most": (options.keep + 1) * each + exports * export,
    }


def as_text(result: dict[str, Any]) -> str:
    """The report for people: a line for each of its parts."""
    place = "on the policy's GPUs" if result["colocated"] else "on hosts of their own"
    push, on_disk = result["push"], result["disk_bytes"]
    rows = [
        ("hosts", f"{result['hosts']}"),
        ("policy", f"{result['ranks']} ranks: {result['layout']}"),
        ("engines", f"{result['engines']} engines of tp{result['engine_tensor_parallel']}, {place}"),
    ]
    if memory_of := result["memory"]:
        by_phase = memory_of["peak_gib_by_phase"]
        fits = "" if memory_of["fits"] else "DOES NOT FIT: "
        seconds = result["seconds"]
        stages = ("generate", "switch", "old_logprobs", "update", "sync")
        rows += [
            ("memory by phase, GiB", ", ".join(f"{phase} {gib:.1f}" for phase, gib in by_phase.items())),
            ("", f"{fits}{memory_of['margin_gib']:.1f} of {memory_of['gpu_gib']:.1f} stay free"),
            ("seconds by stage", ", ".join(f"{name} {seconds[name]:,.0f}" for name in stages)),
            ("", f"a step {seconds['step']:,.0f}, MFU of its updates {seconds['mfu']:.0%} (estimate)"),
        ]
    else:
        rows.append(("memory, seconds", "not planned for run.device=cpu"))
    gigabytes = ", ".join(f"{link.replace('_', ' ')} {push['bytes'][link] / 1e9:,.1f}" for link in LINKS)
    rows += [
        ("a push by link, GB", f"{gigabytes}; {push['seconds']['push']:.2f} s at the data sheets' numbers"),
        (
            "on the disk, GB",
            f"a checkpoint {on_disk['checkpoint'] / 1e9:,.1f}, an export {on_disk['export'] / 1e9:,.1f}, at "
            f"most {on_disk['most'] / 1e9:,.1f}",
        ),
        *(("not counted", text) for text in result["left_out"]),
    ]
    return "\n".join(
        [f"{result['model']} on {result['gpu']}: planned, not measured", *(f"{a:<22}{b}" for a, b in rows)]
    )
