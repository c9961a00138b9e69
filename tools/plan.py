#!/usr/bin/env python
"""Plan what a run will do before renting the machine.

    python tools/plan.py run --config examples/configs/qwen32b.yaml [--nnodes 16 --gpus-per-node 8] [--json]
    python tools/plan.py memory --config examples/configs/qwen32b.yaml [--gpu H100] [--json] [--plot OUT.png]
    python tools/plan.py sync --config examples/configs/qwen32b.yaml [section.key=value ...] [--json]
    python tools/plan.py sync --config examples/configs/qwen32b_async.yaml --engine-hosts 12
    python tools/plan.py layouts --model Qwen/Qwen2.5-32B --gpus 128 [--config CONFIG.yaml] [--all] [--json]

`run`: what a launch would be, in seconds: hosts, ranks, engines, memory by phase, seconds by stage, the bytes
of a weight push by link, and what lies on the disk.

`memory`: what lies in the GPUs' memory in each phase of a step, for every kind of rank, whether it fits, and
seconds of the phases (megatron_dapo/planning/). `layouts`: a search over layouts, recomputation, micro-batch
and engines, ranked by the estimated step. Assumptions and validation: docs/planning.md.

`sync`: the plan of a weight push (megatron_dapo/sync/plan.py): which bytes go over which link, what each rank
sends and each engine worker receives, and the seconds that this takes at the stated bandwidths (planned, not
measured). `rollout.engines` counts the engines of each host. They are on the hosts of the policy's ranks
(colocated), or on --engine-hosts other hosts (disaggregated). What engines need is recorded from vLLM's own
loaders on the meta device.

Neither weights nor the network are needed: if model.path is no folder here, tools/model_configs/ has the
config.json of the shipped configurations' models. `--json` prints one object with every number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plans import layouts, memory, run, sync

from megatron_dapo.errors import UserError
from megatron_dapo.sync.plan_report import LINKS

# Each has add_arguments(parser), plan(options) -> the report for JSON, and as_text(report).
COMMANDS = {
    "run": (run, "what a launch would be"),
    "memory": (memory, "memory of the GPUs over a step"),
    "sync": (sync, "a weight push"),
    "layouts": (layouts, "layouts that fit"),
}
LEAST = {"engine_hosts": 0, "gpus_per_host": 1, "gpus_per_node": 1, "nnodes": 1, "gpus": 1, "best": 1}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        searches = name == "layouts"
        of_model = "--model NAME --gpus N [--config CONFIG.yaml]" if searches else "--config CONFIG.yaml"
        command = commands.add_parser(
            name,
            usage=f"%(prog)s {of_model} [section.key=value ...] [options]",
            allow_abbrev=False,
            help=text,
        )
        command.add_argument("--config", type=Path, required=not searches, metavar="CONFIG.yaml")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        module.add_arguments(command)
    options, options.overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in options.overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"{wrong[0]} is neither an option nor of the form section.key=value")
    for name, least in LEAST.items():
        if (value := getattr(options, name, None)) is not None and value < least:
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
    module, _ = COMMANDS[options.command]
    try:
        result = module.plan(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if options.json else module.as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
