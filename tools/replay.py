#!/usr/bin/env python
"""One training step from saved rollouts, without vLLM: prints JSON.

    python tools/replay.py --run runs/tiny_dapo --step 3 [section.key=value ...]

The run's own configuration is used, changed by the overrides: another layout must give the same loss and
gradient norm. The weights are those of `model.path`, or of `--checkpoint` (a step_* folder; same tensor and
pipeline sizes as it was saved with).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.report.rollouts import load_groups, rollout_path
from megatron_dapo.train import prepare_device, start_ranks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--step", required=True, type=int, help="step whose rollouts are trained on")
    parser.add_argument("--checkpoint", type=Path, help="continue from this checkpoint instead of model.path")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    try:
        config = RunConfig.load(options.run / "config.yaml", options.overrides)
        if "RANK" in os.environ:
            return replay(config, options)
        # before ranks start: what cannot be trained, a missing or broken file
        preflight.check_training(config)
        load_groups(rollout_path(options.run, options.step))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return start_ranks(config, [__file__, *sys.argv[1:]])


def replay(config: RunConfig, options: argparse.Namespace) -> int:
    """One rank: pack the saved groups for this layout and make the step's updates."""
    import warnings

    warnings.filterwarnings("ignore")
    from megatron_dapo import checkpoint
    from megatron_dapo.batching.step_batch import make_batch
    from megatron_dapo.metrics import flatten
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import backend_of
    from megatron_dapo.policy.step import Policy, combine
    from megatron_dapo.types import Stream

    session = session_file.start(config.layout.to_layout(), backend_of(prepare_device(config)))
    objective = make_objective(config.objective, max_age=config.sampling.max_age)
    policy = Policy(config, session, objective)
    if options.checkpoint:
        checkpoint.load(options.checkpoint, policy)
    groups, _ = load_groups(rollout_path(options.run, options.step))
    # every rank makes the whole batch and takes its part; the weights of step N are trained in step N + 1
    batch = make_batch(groups, config, policy.spec, objective, version=options.step - 1)
    batch = batch.part(session.dp_rank)
    if Stream.OLD_LOGPROBS in objective.needs:
        # Without a checkpoint the weights need not be those that sampled, so the ratio is always taken
        # against them as they are now.
        batch = batch.with_stream(Stream.OLD_LOGPROBS, policy.logprobs(batch))
    batch = policy.streams(batch)
    result = combine([policy.update(batch, k) for k in range(len(batch.mini_batches))])
    if session.rank == 0:
        report = {
            "layout": session.layout.describe(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "num_tokens": result.num_tokens,
            "num_updates": result.num_updates,
            "num_micro_batches": result.num_micro_batches,
            **flatten(result.metrics),
        }
        print(json.dumps(report))
    session_file.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
