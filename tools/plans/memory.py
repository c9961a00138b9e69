"""`plan.py memory`: the memory of every kind of rank in each phase of a step, and seconds of the phases."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.planning.fits import check_model
from megatron_dapo.planning.hardware import ASSUMED, GIB, GPUS, Gpu
from megatron_dapo.planning.memory import ENGINES, PHASES, MemoryPlan, RankMemory, plan_memory
from megatron_dapo.planning.sizes import Sizes, rank_sizes
from megatron_dapo.planning.step_time import StepTime, default_workload, estimate
from megatron_dapo.planning.timeline import one_update, timeline
from plans.models import model_folder
from plans.picture import draw

if TYPE_CHECKING:
    from megatron_dapo.planning.build import Built


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A run on these GPUs. engines: on all hosts together. built: ranks on meta tensors by pipeline stage, if
    they were built.
    """

    config: RunConfig
    model: ModelSpec
    memory: MemoryPlan
    seconds: StepTime
    engines: int
    built: tuple[Built, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="default %(default)s")
    parser.add_argument("--engine-hosts", type=int, default=1, help="hosts of engines, if not colocated")
    parser.add_argument(
        "--formulas",
        action="store_true",
        help="count by formula only; by default every kind of rank is built and run on meta tensors",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="picture of the memory over a step")


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a configuration, for JSON."""
    began, gpu = time.perf_counter(), GPUS[options.gpu]
    config = RunConfig.load(options.config, options.overrides)
    layout = config.layout.to_layout()
    hosts = max(1, layout.world_size // gpu.per_host) if config.rollout.colocated else options.engine_hosts
    planned = plan_run(config, gpu, engine_hosts=hosts, by_formula=options.formulas)
    memory = planned.memory
    if options.plot:
        draw(planned.config, planned.model, memory, planned.seconds, options.plot)
    return {
        "config": str(options.config),
        "model": config.model.path,
        "layout": layout.describe(),
        "gpu": gpu.name,
        "ranks": layout.world_size,
        "distinct_ranks": layout.pp,
        "parameters_counted": "by formula" if options.formulas else "in Megatron's objects on meta tensors",
        **facts(planned),
        "parts_by_phase": {phase: _gib(memory.fullest(phase).parts[phase]) for phase in PHASES},
        "by_rank": [_rank(rank, planned) for rank in memory.ranks],
        "timeline": [
            {
                "phase": moment.phase,
                "start_s": moment.start,
                "seconds": moment.seconds,
                "gib": sum(moment.parts.values()) / GIB,
                "parts": _gib(moment.parts),
            }
            for moment in timeline(memory, planned.seconds)
        ],
        "one_update_gib_by_stage": {
            stage: [size / GIB for size in sizes]
            for stage, sizes in one_update(config, planned.model, memory).items()
        },
        "seconds": seconds_of(planned.seconds),
        "assumptions": dataclasses.asdict(ASSUMED),
        "left_out": left_out(config),
        "planning_seconds": time.perf_counter() - began,
    }


def plan_run(
    config: RunConfig, gpu: Gpu, *, engine_hosts: int, by_formula: bool, on_cpu: bool = False
) -> Planned:
    """With engines on so many hosts. UserError for what the settings, the model or the GPU forbid."""
    preflight.check_settings(config)
    with model_folder(config.model.path) as folder:
        model = read_model(folder)
    reference = None
    if config.objective.reference is not None:
        with model_folder(config.objective.reference) as folder:
            reference = read_model(folder)
    check_model(config, model, None if on_cpu else gpu)
    built, sizes = (), rank_sizes
    if not by_formula:
        from megatron_dapo.planning.build import build_ranks  # loads Megatron

        built = build_ranks(config, model)
        sizes = functools.partial(_built_sizes, built, model)
    memory = plan_memory(config, model, gpu, sizes, reference=reference)
    engines = config.rollout.engines * engine_hosts
    return Planned(
        config=config,
        model=model,
        memory=memory,
        seconds=estimate(config, model, memory, default_workload(config), engines=engines),
        engines=engines,
        built=built,
    )


def _built_sizes(
    built: tuple[Built, ...],
    model: ModelSpec,
    config: RunConfig,
    of: ModelSpec,
    stage: int,
    *,
    value: bool = False,
) -> Sizes:
    """As rank_sizes; a reference model of another size is counted by formula."""
    if of != model:
        return rank_sizes(config, of, stage, value=value)
    rank = built[stage]
    return rank.value if value and rank.value else rank.sizes


def facts(planned: Planned) -> dict[str, Any]:
    """What all reports say of the memory."""
    memory = planned.memory
    return {
        "gpu_gib": memory.gpu.speed.memory_bytes / GIB,
        "peak_gib_by_phase": {phase: memory.peak(phase) / GIB for phase in PHASES},
        "fits": memory.margin >= 0 and memory.kv_tokens >= 1,
        "margin_gib": memory.margin / GIB,
        "kv_tokens": round(memory.kv_tokens),
    }


def left_out(config: RunConfig) -> list[str]:
    """What this configuration has and the plan does not count."""
    local = config.policy.layers == "local"
    return ["policy.layers=local: activations are those of TransformerEngine's layers"] if local else []


def _rank(rank: RankMemory, planned: Planned) -> dict[str, Any]:
    gib = {
        "weights": rank.sizes.weights,
        "gradients": rank.sizes.gradients,
        "optimizer": rank.sizes.optimizer,
    }
    passed = planned.built[rank.stage].one_pass if planned.built and rank.stage != ENGINES else None
    return {
        "place": "engines alone" if rank.stage == ENGINES else f"pipeline stage {rank.stage}",
        "ranks": rank.ranks,
        "parameters": rank.sizes.elements,
        **{f"{name}_gib": size / GIB for name, size in gib.items()},
        "layers_in_flight": rank.in_flight,
        "offloaded_gib": rank.offloaded / GIB,
        "gib_by_phase": {phase: rank.total(phase) / GIB for phase in PHASES},
        "one_micro_batch": passed and {f"{name}_gib": size / GIB for name, size in passed.bytes().items()},
    }


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def seconds_of(seconds: StepTime) -> dict[str, Any]:
    phases = ("generate", "switch", "old_logprobs", "update", "sync", "step")
    return {name: getattr(seconds, name) for name in phases} | {
        "update_parts": seconds.update_parts,
        "mfu": seconds.mfu,
    }


def as_text(result: dict[str, Any]) -> str:
    """The report for people: a table of the fullest GPU in each phase, and of the kinds of ranks."""
    names = list(dict.fromkeys(name for parts in result["parts_by_phase"].values() for name in parts))
    lines = [
        f"{result['model']}: {result['layout']} = {result['ranks']} ranks of {result['distinct_ranks']} "
        f"kinds on {result['gpu']} ({result['gpu_gib']:.1f} GiB); planned, not measured",
        f"{'GiB on the fullest GPU':<38}" + "".join(f"{phase:>14}" for phase in PHASES),
    ]
    for name in names:
        sizes = (result["parts_by_phase"][phase].get(name) for phase in PHASES)
        lines.append(f"{name:<38}" + "".join(f"{'' if s is None else f'{s:.2f}':>14}" for s in sizes))
    lines.append(f"{'all':<38}" + "".join(f"{result['peak_gib_by_phase'][phase]:>14.2f}" for phase in PHASES))
    lines.append(
        f"{'kind of rank':<20}{'ranks':>7}{'parameters':>16}{'layers in flight':>18}{'offloaded':>11}"
    )
    lines += [
        f"{rank['place']:<20}{rank['ranks']:>7}{rank['parameters']:>16,}{rank['layers_in_flight']:>18}"
        f"{rank['offloaded_gib']:>11.2f}"
        for rank in result["by_rank"]
    ]
    lines += [_in_words(rank) for rank in result["by_rank"] if rank["one_micro_batch"]]
    seconds = result["seconds"]
    lines += [
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {result['margin_gib']:.1f} GiB stay free; an "
        f"engine's cache holds {result['kv_tokens']:,} tokens",
        f"estimated step {seconds['step']:,.0f} s: generate {seconds['generate']:,.0f}, old "
        f"log-probabilities {seconds['old_logprobs']:,.0f}, update {seconds['update']:,.0f} (MFU "
        f"{seconds['mfu']:.0%}), sync {seconds['sync']:,.0f}, taking turns {seconds['switch']:,.0f}",
    ]
    lines += [f"not counted: {text}" for text in result["left_out"]]
    return "\n".join(lines)


def _in_words(rank: dict[str, Any]) -> str:
    kept = rank["one_micro_batch"]
    return (
        f"{rank['place']} keeps of one micro-batch {kept['te_table_gib']:.2f} GiB (table); local layers "
        f"{kept['autograd_gib']:.2f} in a pass on meta tensors, {kept['local_table_gib']:.2f} by their table"
    )
