"""What ranks do in tests/test_checkpoint.py: train and save, fail to save, resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.types import Batch
from support.cases import PolicyRun, plan
from support.jobs_background import opening
from support.jobs_policy import digest, open_policy, part_of
from support.samples import make_samples

OPTIMIZER = (
    "optimizer.lr=1e-3",
    "optimizer.warmup_updates=3",
    "optimizer.decay=cosine",
    "optimizer.decay_updates=9",
)


def checkpoint_run(name: str, model: str) -> PolicyRun:
    """The run with this name: that of a layout, `_offload` behind it for bf16 with half the optimizer in host
    memory.
    """
    layout = name.removesuffix("_offload")
    offload = ["model.dtype=bf16", "optimizer.cpu_offload=0.5"] if layout != name else []
    return PolicyRun(name=name, model=model, layout=layout, overrides=[*OPTIMIZER, *offload])


def train_and_save(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Four updates of each; saves after the first and second (keeping two), then fails to save, on rank 1
    alone, after the third.
    """
    from megatron_dapo import checkpoint

    reports: dict[str, Any] = {}
    for run in runs:
        run_dir = Path(folder) / run.name
        with open_policy(run, f"{folder}/save-{run.name}.store") as policy:
            if policy is None:
                continue
            batch = _batch_of(policy)
            updates = []
            for number in range(4):
                updates.append(_update(policy, batch, number))
                if number < 2:
                    checkpoint.save(run_dir, policy, _run_state(policy, number + 1), keep=2)
            parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
            on_host = sum(len(getattr(part.optimizer, "gpu_params_map_cpu_copy", ())) for part in parts)
            shards = sum(len(part.get_parameters()) for part in parts)
            reports[run.name] = {
                "updates": updates,
                "failure": _fail_to_save(policy, run_dir),
                "on_host": [on_host, shards],
            }
    return reports


def resume(runs: Sequence[PolicyRun], folder: str, saved_by: dict[str, str]) -> dict[str, Any]:
    """Load the newest checkpoint of each run, update twice, save again keeping one. `saved_by`: runs that
    load the checkpoint of another run, and save nothing.
    """
    from megatron_dapo import checkpoint

    reports: dict[str, Any] = {}
    for run in runs:
        run_dir = Path(folder) / saved_by.get(run.name, run.name)
        with open_policy(run, f"{folder}/resume-{run.name}.store") as policy:
            if policy is None:
                continue
            newest = checkpoint.find(run_dir, "auto")
            assert newest is not None
            state = checkpoint.read_state(newest, policy.session.rank)
            checkpoint.load(newest, policy)
            norms = list(policy.guard.norms)
            batch = _batch_of(policy)
            reports[run.name] = {
                "folder": newest.name,
                "state": [state.step, state.rollouts, policy.num_updates],
                "norms": norms,
                "updates": [_update(policy, batch, number) for number in (2, 3)],
            }
            if run.name not in saved_by:
                checkpoint.save(run_dir, policy, _run_state(policy, 4), keep=1)
    return reports


def _batch_of(policy: Any) -> Batch:
    """Old log-probabilities are those of each update itself, so that a resumed run needs none of before."""
    whole = plan(make_samples(), policy.session.layout, num_updates=2, budget="half")
    return part_of(policy, whole)


def _update(policy: Any, batch: Batch, number: int) -> dict[str, Any]:
    result = policy.update(batch, number % 2)
    return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "state": digest(policy)}


def _run_state(policy: Any, step: int) -> Any:
    from megatron_dapo.checkpoint import RunState

    state = RunState(step=step, rollouts={"cursor": 7 * step})
    return state if policy.session.rank == 0 else None


def _fail_to_save(policy: Any, run_dir: Path) -> str | None:
    """The disk is full for rank 1 alone: the message of SaveFailed on this rank."""
    from megatron_dapo import checkpoint
    from megatron_dapo.checkpoint_writer import SaveFailed

    try:
        with opening(lambda file: "/dev/full" if policy.session.rank == 1 else file):
            checkpoint.save(run_dir, policy, _run_state(policy, 3), keep=1)
    except SaveFailed as failure:
        return str(failure)
    return None
