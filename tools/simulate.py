#!/usr/bin/env python
"""Simulate steps of a run before renting the machine: the real rollouts against simulated engines.

    python tools/simulate.py examples/configs/qwen32b.yaml --engines 32 --steps 20 --seed 0 --plot gantt.png
    python tools/simulate.py examples/configs/qwen32b.yaml --engines 32 --compare sampling.max_age=0,1
    python tools/simulate.py --from runs/X sampling.prompts_per_step=64 --engines 4

`--from` takes lengths, verdicts and speeds from what a run has measured (its facts.jsonl), and the run's
configuration unless CONFIG.yaml is given; overrides come on top.

Prints one JSON object (with --compare a list of them, one for each value). Model, assumptions and keys:
docs/simulator.md. It reads no model, tokenizer or data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate import Simulation
from megatron_dapo.rollout.simulate_calibrate import calibrate
from megatron_dapo.rollout.simulate_ledger import Timeline
from megatron_dapo.rollout.simulate_model import Profile, load_profile
from megatron_dapo.rollout.simulate_observed import ObservedStream
from megatron_dapo.rollout.simulate_prompts import (
    PlannedStream,
    Stream,
    default_difficulties,
    load_difficulties,
)

PHASE_COLOURS = {"trainer": "#c44e2c", "sync": "#8a6fb0"}  # the rest of a step is rollout
ENGINE_COLOURS = "Blues"
MIN_PICTURE_INCHES, INCHES_PER_ENGINE = 3.0, 0.16


def run(config: RunConfig, options: argparse.Namespace) -> tuple[dict[str, Any], Timeline]:
    """One simulation, as the command line asks for it."""
    calibration = options.calibration
    planned = calibration.profile if calibration else None
    profile = load_profile(config, options.engine_speed, planned)
    if options.colocated:
        profile = dataclasses.replace(profile, colocated=True)
    simulation = Simulation(
        config,
        profile,
        make_stream(config, profile, options),
        engines=options.engines or (calibration and calibration.engines) or config.rollout.engines,
        steps=options.steps,
        message=lambda line: print(line, file=sys.stderr),
    )
    result = simulation.simulate()
    return (result | {"calibration": calibration.report} if calibration else result), simulation.timeline


def make_stream(config: RunConfig, profile: Profile, options: argparse.Namespace) -> Stream:
    """The prompts: of a file, of the run that was measured, or the planned mixture."""
    longest, seed = config.rollout.max_tokens, options.seed
    if options.prompts is None and (calibration := options.calibration):
        return ObservedStream(calibration.groups, longest=calibration.longest, seed=seed, max_tokens=longest)
    rows = load_difficulties(options.prompts) if options.prompts else default_difficulties(longest)
    return PlannedStream(rows, seed=seed, max_tokens=longest, prompt_tokens=profile.prompt_tokens)


def load_config(options: argparse.Namespace, *more: str) -> RunConfig:
    return RunConfig.load(options.config, [*options.overrides, *more])


def compare(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[tuple[str, Timeline]]]:
    """One result for each value of `--compare KEY=A,B`."""
    key, _, values = options.compare.partition("=")
    if not values:
        raise UserError(f"--compare {options.compare} is not of the form section.key=A,B")
    if key == "rollout.engines" and options.engines:
        raise UserError("--compare rollout.engines and --engines both set the number; take one of them out")
    results, timelines = [], []
    for value in values.split(","):
        config = load_config(options, f"{key}={value}")
        if key == "rollout.engines":
            options.engines = config.rollout.engines
        result, timeline = run(config, options)
        results.append({"compare": {"key": key, "value": value}} | result)
        timelines.append((f"{key}={value}", timeline))
    return results, timelines


def draw(timelines: Sequence[tuple[str, Timeline]], out: Path) -> None:
    """Write the PNG, whole or not at all: one row for the trainer and one for each engine, darker where more
    sequences run.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [MIN_PICTURE_INCHES + INCHES_PER_ENGINE * len(t.levels) for _, t in timelines]
    figure, axes = plt.subplots(
        len(timelines),
        squeeze=False,
        figsize=(12, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    shade = plt.get_cmap(ENGINE_COLOURS)
    for axis, (title, timeline) in zip(axes[:, 0], timelines, strict=True):
        for index, levels in enumerate(timeline.levels):
            spans, colours = [], []
            for (begin, running), (end, _) in zip(levels, levels[1:], strict=False):
                if running:
                    spans.append((begin, end - begin))
                    colours.append(shade(0.25 + 0.75 * running / timeline.max_running))
            axis.broken_barh(spans, (index + 0.05, 0.9), facecolors=colours)
        for name, colour in PHASE_COLOURS.items():
            spans = [(begin, end - begin) for phase, begin, end in timeline.phases if phase == name]
            axis.broken_barh(spans, (-1.95, 1.9), facecolors=colour, label=name)
        engines = range(0, len(timeline.levels), 1 + len(timeline.levels) // 16)
        axis.set(xlabel="simulated seconds", title=title, ylim=(-2, len(timeline.levels)))
        axis.set_yticks([-1, *(i + 0.5 for i in engines)], ["policy", *(f"engine {i}" for i in engines)])
        axis.legend(loc="upper right", fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(unfinished, out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG.yaml section.key=value",
        help="the file may be left out with --from",
    )
    parser.add_argument(
        "--from", dest="run", type=Path, metavar="RUN", help="calibrate with this run's folder"
    )
    parser.add_argument("--steps", type=int, default=20, help="rollout steps (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and verdicts (default 0)")
    parser.add_argument(
        "--engines",
        type=int,
        help="all hosts together; default: those of the run, else rollout.engines, which counts one host's",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="the prompt stream's difficulties")
    parser.add_argument("--engine-speed", type=Path, metavar="FILE.json", help="measured speeds; faults")
    parser.add_argument(
        "--colocated", action="store_true", help="engines sleep on the GPUs while the policy trains"
    )
    parser.add_argument("--compare", metavar="KEY=A,B,...", help="simulate once for each value of a key")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="picture of engines and trainer over time"
    )
    options = parser.parse_intermixed_args(arguments)
    for name, least in (("steps", 1), ("engines", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be at least {least}")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot} must end in .png")
    files = [argument for argument in options.arguments if "=" not in argument]
    options.overrides = [argument for argument in options.arguments if "=" in argument]
    if len(files) > 1 or not (files or options.run):
        parser.error(f"give one CONFIG.yaml, or --from RUN; got {', '.join(files) or 'neither'}")
    options.config = Path(files[0]) if files else options.run / "config.yaml"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.calibration = None
        if options.run:
            options.calibration = calibrate(options.run, RunConfig.load(options.run / "config.yaml"))
        if options.compare:
            result, timelines = compare(options)
        else:
            result, timeline = run(load_config(options), options)
            timelines = [(str(options.run or options.config.name), timeline)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plot:
        draw(timelines, options.plot)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
