"""`plan.py memory`: the memory of every kind of rank in each phase of a step, and seconds of the phases."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import ModelSpec, read_model
from megatron_dapo.planning.hardware import ASSUMED, GIB, GPUS
from megatron_dapo.planning.memory import ENGINES, PHASES, MemoryPlan, RankMemory, plan_memory
from megatron_dapo.planning.sizes import Sizes, rank_sizes
from megatron_dapo.planning.step_time import StepTime, default_workload, estimate
from megatron_dapo.policy import rules
from plans.models import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="default %(default)s")
    parser.add_argument(
        "--formulas",
        action="store_true",
        help="count parameters by formula only; by default every kind of rank is built on meta tensors",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="picture of the memory over a step")


def plan(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The report of a configuration, for JSON."""
    began, gpu = time.perf_counter(), GPUS[options.gpu]
    preflight.check_settings(config)
    with model_folder(config.model.path) as folder:
        model = read_model(folder)
    rules.check_model(config, model, on_cpu=False)
    sizes = rank_sizes if options.formulas else _builder(config, model)
    memory = plan_memory(config, model, gpu, sizes)
    layout, rollout = config.layout.to_layout(), config.rollout
    hosts = max(1, layout.world_size // gpu.per_host)
    engines = rollout.engines * (hosts if rollout.colocated else options.engine_hosts)
    seconds = estimate(config, model, memory, default_workload(config), engines=engines)
    if options.plot:
        draw(memory, seconds, f"{config.model.path}, {layout.describe()}", options.plot)
    return {
        "config": str(options.config),
        "model": config.model.path,
        "layout": layout.describe(),
        "gpu": gpu.name,
        "gpu_gib": gpu.speed.memory_bytes / GIB,
        "ranks": layout.world_size,
        "distinct_ranks": layout.pp,
        "parameters_counted": "by formula" if options.formulas else "in Megatron's objects on meta tensors",
        "peak_gib_by_phase": {phase: memory.peak(phase) / GIB for phase in PHASES},
        "parts_by_phase": {phase: _gib(memory.fullest(phase).parts[phase]) for phase in PHASES},
        "fits": memory.margin >= 0 and memory.kv_tokens >= 1,
        "margin_gib": memory.margin / GIB,
        "by_rank": [_rank(rank, memory) for rank in memory.ranks],
        "kv_tokens": round(memory.kv_tokens),
        "seconds": _seconds(seconds),
        "assumptions": dataclasses.asdict(ASSUMED),
        "left_out": left_out(config),
        "planning_seconds": time.perf_counter() - began,
    }


def left_out(config: RunConfig) -> list[str]:
    """What this configuration has and the plan does not count."""
    found = []
    if config.policy.fp8 is not None:
        found.append("policy.fp8: layers are counted in bf16")
    if config.objective.kind in ("ppo", "dpo") or getattr(config.objective, "kl_coef", 0):
        found.append(f"objective.kind={config.objective.kind}: other models than the policy")
    return found


def _builder(config: RunConfig, model: ModelSpec) -> Any:
    from megatron_dapo.planning.build import built_sizes

    built = built_sizes(config, model, range(config.layout.pipeline_parallel))

    def sizes(config: RunConfig, model: ModelSpec, stage: int) -> Sizes:
        return built[stage]

    return sizes


def _rank(rank: RankMemory, memory: MemoryPlan) -> dict[str, Any]:
    gib = {
        "weights": rank.sizes.weights,
        "gradients": rank.sizes.gradients,
        "optimizer": rank.sizes.optimizer,
    }
    return {
        "place": "engines alone" if rank.stage == ENGINES else f"pipeline stage {rank.stage}",
        "ranks": rank.ranks,
        "parameters": rank.sizes.elements,
        **{f"{name}_gib": size / GIB for name, size in gib.items()},
        "layers_in_flight": rank.in_flight,
        "offloaded_gib": rank.offloaded / GIB,
        "gib_by_phase": {phase: rank.total(phase) / GIB for phase in PHASES},
    }


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def _seconds(seconds: StepTime) -> dict[str, Any]:
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


def draw(memory: MemoryPlan, seconds: StepTime, title: str, out: Path) -> None:
    """Write the PNG, whole or not at all: the fullest GPU over the seconds of a step, what lies there on top
    of each other. Each phase is as wide as it takes, and a twentieth of the step at least.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 6), layout="constrained")
    stages = {phase: memory.fullest(phase).parts[phase] for phase in PHASES}
    names = list(dict.fromkeys(name for parts in stages.values() for name in parts))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    began, ticks = 0.0, []
    for phase, parts in stages.items():
        width, base = max(getattr(seconds, phase), seconds.step / 20), 0.0
        for name, size in parts.items():
            axis.bar(began, size / GIB, width, base, align="edge", color=colours[name], label=name)
            base += size / GIB
        ticks.append((began + width / 2, f"{phase}\n{getattr(seconds, phase):,.0f} s"))
        began += width
    total = memory.gpu.speed.memory_bytes / GIB
    axis.axhline(total, color="black", linestyle="--")
    axis.set(
        ylabel="GiB of the fullest GPU", title=f"{title}, {memory.gpu.name}: planned", ylim=(0, total * 1.1)
    )
    axis.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(unfinished, out)
