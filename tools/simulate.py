#!/usr/bin/env python
"""Simulate steps of a run before renting the machine: the real collector and fleet against simulated engines.

    python tools/simulate.py examples/configs/qwen32b.yaml --engines 32 --steps 20 --seed 0 --plot gantt.png
    python tools/simulate.py examples/configs/qwen32b.yaml --engines 32 --compare sampling.max_age=0,1

Prints one JSON object (with --compare a list of them, one for each value). Model, assumptions and keys:
docs/simulator.md. It reads no model, tokenizer or data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.rollout.simulate import Timeline, simulate
from megatron_dapo.rollout.simulate_model import load_profile
from megatron_dapo.rollout.simulate_prompts import default_difficulties, load_difficulties

PHASE_COLOURS = {"trainer": "#c44e2c", "sync": "#8a6fb0"}  # the rest of a step is rollout
ENGINE_COLOURS = "Blues"
MIN_PICTURE_INCHES, INCHES_PER_ENGINE = 3.0, 0.16


def run(config: RunConfig, options: argparse.Namespace) -> tuple[dict[str, Any], Timeline]:
    """One simulation, as the command line asks for it."""
    profile = load_profile(config, options.engine_speed)
    if options.prompts:
        difficulties = load_difficulties(options.prompts)
    else:
        difficulties = default_difficulties(config.rollout.max_tokens)
    return simulate(
        config,
        profile,
        difficulties,
        engines=options.engines or config.rollout.engines,
        steps=options.steps,
        seed=options.seed,
        message=lambda line: print(line, file=sys.stderr),
    )


def compare(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[tuple[str, Timeline]]]:
    """One result for each value of `--compare KEY=A,B`."""
    key, _, values = options.compare.partition("=")
    if not values:
        raise UserError(f"--compare {options.compare} is not of the form section.key=A,B")
    if key == "rollout.engines" and options.engines:
        raise UserError("--compare rollout.engines and --engines both set the number; take one of them out")
    results, timelines = [], []
    for value in values.split(","):
        config = RunConfig.load(options.config, [*options.overrides, f"{key}={value}"])
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
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=20, help="rollout steps (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and verdicts (default 0)")
    parser.add_argument(
        "--engines",
        type=int,
        help="all hosts together; default: rollout.engines, which counts those of one host",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="the prompt stream's difficulties")
    parser.add_argument("--engine-speed", type=Path, metavar="FILE.json", help="measured speeds; faults")
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
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.compare:
            result, timelines = compare(options)
        else:
            config = RunConfig.load(options.config, options.overrides)
            result, timeline = run(config, options)
            timelines = [(options.config.name, timeline)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plot:
        draw(timelines, options.plot)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
