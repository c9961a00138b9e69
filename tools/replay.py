#!/usr/bin/env python
"""One training step from saved rollouts, without vLLM: prints JSON.

    python tools/replay.py --run runs/tiny_dapo --step 3 [section.key=value ...]

The run's own configuration is used, changed by the overrides: another layout must give the same loss and gradient norm.
The weights are those of `model.path`, or of `--checkpoint` (a step_* folder; same tensor and pipeline sizes as it was saved with).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_dapo.config import RunConfig
from megatron_dapo.train import prepare_device, start_ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--step", required=True, type=int, help="step whose rollouts are trained on")
    parser.add_argument("--checkpoint", type=Path, help="continue from this checkpoint instead of model.path")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    try:
        config = RunConfig.load(options.run / "config.yaml", options.overrides)
        if "RANK" in os.environ:
            return replay(config, options)
        from megatron_dapo.report.rollouts import load_groups, rollout_path

        load_groups(rollout_path(options.run, options.step))  # refuse a missing or broken file before ranks start
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return start_ranks(config, [__file__, *sys.argv[1:]])


def replay(config: RunConfig, options: argparse.Namespace) -> int:
    """One rank: pack the saved groups for this layout and make the step's updates."""
    import warnings

    warnings.filterwarnings("ignore")
    from megatron_dapo import checkpoint
    from megatron_dapo.policy import parallel
    from megatron_dapo.policy.step import Policy, combine
    from megatron_dapo.report.metrics import flatten
    from megatron_dapo.report.rollouts import load_groups, rollout_path
    from megatron_dapo.trainer import make_batch

    policy = Policy(config, on_cpu=prepare_device(config))
    if options.checkpoint:
        checkpoint.load(options.checkpoint, policy)
    groups, _ = load_groups(rollout_path(options.run, options.step))
    batch = make_batch(groups, config, policy.hf)
    # Without a checkpoint the weights need not be those that sampled, so the ratio is always taken against them as they are now.
    old_logprobs_T = policy.logprobs(batch)
    result = combine([policy.update(batch, k, old_logprobs_T) for k in range(len(batch.mini_batches))])
    if policy.place.rank == 0:
        report = {
            "layout": policy.place.layout.describe(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "num_tokens": result.num_tokens,
            "num_updates": result.num_updates,
            "num_micro_batches": result.num_micro_batches,
            **flatten(result.metrics),
        }
        print(json.dumps(report))
    parallel.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
