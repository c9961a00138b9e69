"""`plan.py layouts`: layouts that fit, by the estimated seconds of a step, and why others do not."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.model_spec import read_model
from megatron_dapo.planning.hardware import GIB, GPUS
from megatron_dapo.planning.layouts import overrides, search, simulator_profile
from megatron_dapo.planning.memory import PHASES
from megatron_dapo.planning.step_time import default_workload
from plans.models import model_folder

# Without --config: the lengths and updates of the paper's run.
RECIPE = ("rollout.max_tokens=20480", "batch.updates_per_step=16", "sampling.max_age=0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of a checkpoint or a known name; default: that of --config")
    parser.add_argument("--gpus", type=int, required=True, help="all hosts together")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="default %(default)s")
    parser.add_argument("--best", type=int, default=10, help="how many to print (default %(default)s)")
    parser.add_argument("--all", action="store_true", help="list every rejected combination too")
    parser.add_argument(
        "--engine-speed",
        type=Path,
        metavar="OUT.json",
        help="write what tools/simulate.py takes, of the best",
    )


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a search, for JSON."""
    began, gpu = time.perf_counter(), GPUS[options.gpu]
    model = [f"model.path={options.model}"] if options.model else []
    recipe = [] if options.config else RECIPE
    config = RunConfig.load(options.config, [*recipe, *model, *options.overrides])
    with model_folder(config.model.path) as folder:
        spec = read_model(folder)
    work = default_workload(config)
    found, rejected = search(config, spec, gpu, options.gpus, work)
    if options.engine_speed and found:
        options.engine_speed.write_text(json.dumps(simulator_profile(found[0], spec, work), indent=2))
    return {
        "model": config.model.path,
        "gpus": options.gpus,
        "gpu": gpu.name,
        "fitting": len(found),
        "layouts": [
            {
                "layout": proposal.config.layout.to_layout().describe(),
                "overrides": overrides(proposal),
                "engines": proposal.engines,
                "step_seconds": proposal.time.step,
                "generate_seconds": proposal.time.generate,
                "update_seconds": proposal.time.update,
                "mfu": proposal.time.mfu,
                "peak_gib_by_phase": {phase: proposal.memory.peak(phase) / GIB for phase in PHASES},
                "margin_gib": proposal.memory.margin / GIB,
                "kv_tokens": math.floor(proposal.memory.kv_tokens),
            }
            for proposal in found[: options.best]
        ],
        "rejected": {
            reason: {"count": why.count, "closest": why.closest[0]}
            | _lacks(why.closest[1])
            | ({"each": [{"what": what} | _lacks(over) for what, over in why.each]} if options.all else {})
            for reason, why in rejected.items()
        },
        "planning_seconds": time.perf_counter() - began,
    }


def _lacks(over: float) -> dict[str, float]:
    return {"lacks_gib": over / GIB} if math.isfinite(over) else {}


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['gpus']} x {result['gpu']}: {result['fitting']} combinations fit, "
        f"{sum(why['count'] for why in result['rejected'].values())} do not; planned, not measured",
        f"{'step, s':>9}{'generate':>10}{'update':>8}{'MFU':>6}{'GiB free':>10}  layout and the rest",
    ]
    for row in result["layouts"]:
        others = " ".join(word for word in row["overrides"] if not word.startswith("layout."))
        lines.append(
            f"{row['step_seconds']:>9,.0f}{row['generate_seconds']:>10,.0f}{row['update_seconds']:>8,.0f}"
            f"{row['mfu']:>6.0%}{row['margin_gib']:>10.1f}  {row['layout']}: {others}"
        )
    for reason, why in result["rejected"].items():
        lines.append(f"rejected, {reason}: {why['count']}; the closest: {_in_words(why['closest'], why)}")
        lines += [f"    {_in_words(one['what'], one)}" for one in why.get("each", ())]
    return "\n".join(lines)


def _in_words(what: str, lacks: dict[str, Any]) -> str:
    return what + (f", lacks {lacks['lacks_gib']:.1f} GiB" if "lacks_gib" in lacks else "")
