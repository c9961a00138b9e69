"""What ranks do in the tests of FP8's emulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.cases import PolicyRun, plan
from support.jobs_policy import logprobs_of_samples, open_policy, part_of
from support.samples import make_samples


def measure(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Log-probabilities of all samples before and after an update, its report, and the tokens of the
    micro-batches, of every run.
    """
    reports = {}
    for number, run in enumerate(runs):
        with open_policy(run, f"{folder}/{number}.store") as policy:
            if policy is None:
                continue
            batch = part_of(policy, plan(make_samples(), policy.session.layout, num_updates=1, budget="half"))
            before = logprobs_of_samples(policy, num_updates=1)
            result = policy.update(batch, 0)
            reports[run.name] = {
                "before": before,
                "after": logprobs_of_samples(policy, num_updates=1),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "tokens": [micro.tokens_1T.numel() for micro in policy.micro_batches(batch, 0)],
                "scale": second_mlp_layer(policy).quantizer.scale if "delayed" in run.name else None,
            }
    return reports


def second_mlp_layer(policy: Any) -> Any:
    """The last linear layer of this rank's first transformer layer."""
    modules = policy.chunks[0].module.named_modules()
    return {name.split(".")[-1]: m for name, m in modules if ".layers.0." in name}["linear_fc2"]


def save_and_resume(model: str, folder: str, layout: str) -> list[list[float]]:
    """Loss-bearing figures of two updates, the second one made by the same policy and by one that resumed
    after the first.
    """
    from megatron_dapo import checkpoint

    overrides = ["policy.fp8.recipe=delayed", "optimizer.lr=1e-3"]
    run = PolicyRun(name="delayed", model=model, layout=layout, overrides=overrides)
    figures = []
    for resumed in (False, True):
        with open_policy(run, f"{folder}/{resumed}.store") as policy:
            batch = part_of(policy, plan(make_samples(), policy.session.layout, num_updates=2, budget="half"))
            if resumed:
                checkpoint.load(checkpoint.find(Path(folder), "auto"), policy)
            else:
                policy.update(batch, 0)
                rank_0 = policy.session.rank == 0
                state = checkpoint.RunState(step=1, rollouts={}) if rank_0 else None
                checkpoint.save(Path(folder), policy, state, keep=1)
            scale = dict(second_mlp_layer(policy).quantizer.scale)
            result = policy.update(batch, 1)
            figures.append([result.loss, result.grad_norm, *scale.values()])
    return figures
