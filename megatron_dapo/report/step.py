"""The metrics of one step, under their public names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import psutil

from megatron_dapo.metrics import flatten
from megatron_dapo.types import Batch, Collected, StepResult

COUNTS = ("groups_sampled", "groups_accepted", "all_correct", "all_wrong", "outside_window")
COUNTS += ("carried", "carried_over", "left_running", "surplus_dropped", "aborted", "overdue")
STAGES = ("rollout", "old_logprobs", "update", "sync", "checkpoint", "step")
# Public names of what the policy and the objectives measure; a metric that is not here is reported as
# objective/<its name>.
POLICY_NAMES = {
    "gap": "policy/rollout_logprob_gap",
    "gap_max": "policy/rollout_logprob_gap_max",
    "kl_k1": "mismatch/kl_k1",
    "kl_k3": "mismatch/kl_k3",
    "ess": "mismatch/ess",
    "masked": "mismatch/masked",
} | {
    name: f"policy/{name}"
    for name in (
        "entropy",
        "clip_low",
        "clip_high",
        "kl_old",
        "fresh_tokens",
        "skipped_updates",
        "grad_norm_spike",
    )
}


def gap_warning(metrics: Mapping[str, float], limit: float | None) -> str:
    """What to say when engines and policy disagree on the tokens just sampled by more than `limit` nats on
    average; else ''.
    """
    gap = metrics.get("policy/rollout_logprob_gap", math.nan)
    if limit is None or not gap > limit:
        return ""
    return (
        f"the engines' log-probabilities are {gap:.2g} nats from the policy's on average, more than "
        f"report.gap_warning={limit:g}: their weights, or what they compute with them, differ; "
        "run.verify_sync=true compares the weights"
    )


def step_metrics(
    collected: Collected,
    batch: Batch,
    result: StepResult,
    clock: Mapping[str, float],
    *,
    reward_seconds: float,
    request_failures: Mapping[str, int],
    num_updates: int,
) -> dict[str, float]:
    """Everything a step reports, as plain numbers: fractions, tokens, nats, seconds, GiB.

    `accuracy/mean` is over every group sampled in the step, informative or not; `reward/mean` and
    `response/*` are over the groups trained on. `policy/rollout_logprob_gap` compares engine and policy on
    the `policy/fresh_tokens` share of tokens that the present weights sampled: carried groups differ by age,
    not by error. `sampling/request_failures` counts requests that an engine failed and that were made again.
    `time/reward` is waited for by the groups one by one and overlaps with `time/rollout`.
    """
    completions = [c for group in collected.groups for c in group.completions]
    lengths = [len(c.tokens) for c in completions]
    sampled = collected.sampled or collected.groups
    metrics: dict[str, float] = {
        "update": num_updates,
        "lr": result.lr,
        "reward/mean": fmean(r for group in collected.groups for r in group.rewards),
        "accuracy/mean": fmean(group.accuracy for group in sampled),
        "response/length_mean": fmean(lengths),
        "response/length_max": max(lengths),
        "response/truncated": fmean(c.truncated for c in completions),
        "policy/loss": result.loss,
        "policy/grad_norm": result.grad_norm,
        "policy/micro_batches": result.num_micro_batches,
        "packing/imbalance": batch.imbalance,
        "packing/fill": batch.fill,
        "tokens/trained": result.num_tokens,
        "tokens/generated": sum(len(c.tokens) for group in collected.sampled for c in group.completions),
        "time/reward": reward_seconds,
        "memory/rss": psutil.Process().memory_info().rss / 2**30,
    }
    metrics |= {POLICY_NAMES.get(name, f"objective/{name}"): v for name, v in flatten(result.metrics).items()}
    metrics["sampling/request_failures"] = sum(request_failures.values())
    metrics |= {f"sampling/{name}": collected.counts.get(name, 0) for name in COUNTS}
    metrics |= {f"time/{name}": clock.get(name, 0.0) for name in STAGES}
    return metrics
