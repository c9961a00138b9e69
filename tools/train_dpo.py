#!/usr/bin/env python
"""Train on a file of preferences with objective.kind=dpo, without an engine.

    python tools/train_dpo.py CONFIG.yaml objective.kind=dpo data.path=pairs.jsonl [section.key=value ...]

Rows of data.path: {"prompt": "...", "chosen": "...", "rejected": "..."} (data.prompt_key names the first),
written for the model as data.template and data.chat say. A step is one update on sampling.prompts_per_step
pairs; the run ends after run.max_steps, or with data.epochs. The folder run.dir then has metrics.jsonl,
checkpoints/ (the same command goes on from the newest; checkpoint.every_steps) and hf/, as after any run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.data.preferences import PairStream, load_pairs
from megatron_dapo.errors import UserError
from megatron_dapo.train import RUN_ID, die_with_parent, end_with, prepare_device, start_ranks
from megatron_dapo.types import StepResult

OF_ENGINES = ("gap", "gap_max", "fresh_tokens")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    rank = os.environ.get("RANK")
    try:
        config = RunConfig.load(options.config, options.overrides)
        if rank is None or (rank == "0" and os.environ.get("TORCHELASTIC_RUN_ID") != RUN_ID):
            check(config)
        if rank is None:
            file = Path(config.run.dir) / "config.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(config.dump())
            return start_ranks(config, [__file__, str(file)])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    die_with_parent(os.getppid())
    from megatron_dapo.policy import session

    try:
        train(config)
    except BaseException as error:  # Megatron's CheckpointException is no Exception
        return end_with(error)
    session.stop()
    return 0


def check(config: RunConfig) -> None:
    """Refuse, before any rank starts, what cannot be trained; reads all pairs."""
    facts = preflight.check_training(config)
    preflight.model_has_the_positions(facts)
    if config.objective.kind != "dpo":
        raise UserError(
            f"objective.kind={config.objective.kind} does not train on pairs of a file; set "
            "objective.kind=dpo, or use python -m megatron_dapo.train"
        )
    load_pairs(config.data)


def train(config: RunConfig) -> None:
    """One rank of the run. All ranks read the pairs, and each takes its part of every batch."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|megatron|megatron_dapo\.policy\.cpu)\b")
    from transformers import AutoTokenizer

    from megatron_dapo import checkpoint
    from megatron_dapo.batching.step_batch import make_batch
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import backend_of
    from megatron_dapo.policy.step import Policy, combine
    from megatron_dapo.report.sinks import Reporter

    session = session_file.start(config.layout.to_layout(), backend_of(prepare_device(config)))
    run_dir = Path(config.run.dir)
    objective = make_objective(config.objective)
    policy = Policy(config, session, objective)
    pairs = PairStream(load_pairs(config.data), AutoTokenizer.from_pretrained(policy.folder), config)
    folder, state = checkpoint.choose(run_dir, config.checkpoint.resume, session)
    step = state.step if state else 0
    if folder:
        checkpoint.load(folder, policy)
        if held := session.channel.share(state.rollouts.get("pairs") if state and state.rollouts else None):
            pairs.load_state(held)
    reporter = Reporter(run_dir, config, step + 1 if state else None) if session.rank == 0 else None
    if reporter and (moved := checkpoint.set_aside(run_dir, step)):
        reporter.message(f"checkpoints of an earlier run were moved to {moved}")
    keeper = checkpoint.Keeper(config, session, step)

    def say(text: str) -> None:
        if reporter:
            reporter.message(text)

    def now() -> checkpoint.RunState | None:
        return checkpoint.RunState(step=step, rollouts={"pairs": pairs.state()}) if reporter else None

    while step < config.run.max_steps:
        began = time.monotonic()
        keeper.keep(policy, step, now, say)
        groups = pairs.next()
        if not groups:
            break
        batch = make_batch(groups, config, policy.spec, objective, version=step).part(session.dp_rank)
        batch = policy.streams(batch)
        result = combine([policy.update(batch, k) for k in range(len(batch.mini_batches))])
        step += 1
        for warning in result.warnings:
            say(warning)
        if reporter:
            reporter.record(step, step_metrics(result, pairs, time.monotonic() - began))
    keeper.save(policy, step, now, wait=True)
    if config.checkpoint.export_hf:
        say(f"exported {checkpoint.export_hf(run_dir / 'hf', policy, step)}")
    if reporter:
        reporter.close()


def step_metrics(result: StepResult, pairs: PairStream, seconds: float) -> dict[str, float]:
    """Under public names (docs/metrics.md), without those of engines, which there are none of."""
    from megatron_dapo.metrics import flatten
    from megatron_dapo.report.step import POLICY_NAMES

    of_policy = {n: v for n, v in flatten(result.metrics).items() if n not in OF_ENGINES}
    return {
        "lr": result.lr,
        "policy/loss": result.loss,
        "policy/grad_norm": result.grad_norm,
        "policy/micro_batches": result.num_micro_batches,
        "tokens/trained": result.num_tokens,
        "data/epochs": pairs.epochs,
        "data/passed_over_long": pairs.num_long,
        "time/step": seconds,
        **{POLICY_NAMES.get(name, f"objective/{name}"): value for name, value in of_policy.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
