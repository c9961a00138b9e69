"""The metrics of one step, under their public names (docs/metrics.md)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import psutil

from megatron_dapo.metrics import flatten
from megatron_dapo.types import Batch, Collected, Group, GroupFacts, StepResult

COUNTS = ("groups_sampled", "groups_accepted", "all_correct", "all_wrong", "outside_window", "ungraded")
COUNTS += ("carried", "carried_over", "left_running", "surplus_dropped", "aborted", "overdue")
GRADES = ("correct", "wrong", "no_answer", "timeout", "crashed")  # what becomes of a response's grade
# why tokens were generated for nothing
WASTE = ("all_correct", "all_wrong", "outside_window", "ungraded", "surplus")
STAGES = ("rollout", "sleep", "old_logprobs", "update", "wake", "sync", "checkpoint", "step")
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
        "clip_dual",
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
    version: int,
    reward_seconds: float,
    grades: Mapping[str, int],
    request_failures: Mapping[str, int],
    num_updates: int,
) -> dict[str, float]:
    """Everything a step reports, as plain numbers: fractions, tokens, nats, seconds, GiB.

    clock: seconds by the step's parts. version: the weights that were trained. reward_seconds: in which a
    completion waited for its grade. grades: completions graded, by outcome. request_failures: requests that
    an engine failed and that were made again, by reason.
    """
    completions = [c for group in collected.groups for c in group.completions]
    lengths = [len(c.tokens) for c in completions]
    metrics: dict[str, float] = {
        "update": num_updates,
        "lr": result.lr,
        "reward/mean": fmean(_graded_rewards(collected.groups)),
        "accuracy/mean": fmean(_accuracies(collected.sampled or collected.groups)),
        "response/length_mean": fmean(lengths),
        "response/length_max": max(lengths),
        "response/truncated": fmean(c.truncated for c in completions),
        "policy/loss": result.loss,
        "policy/grad_norm": result.grad_norm,
        "policy/micro_batches": result.num_micro_batches,
        "packing/imbalance": batch.imbalance,
        "packing/fill": batch.fill,
        "tokens/trained": result.num_tokens,
        "tokens/generated": sum(sum(facts.lengths) for facts in collected.sampled),
        "time/reward": reward_seconds,
        "memory/rss": psutil.Process().memory_info().rss / 2**30,
    }
    metrics |= {POLICY_NAMES.get(name, f"objective/{name}"): v for name, v in flatten(result.metrics).items()}
    metrics |= {f"reward/{outcome}": grades.get(outcome, 0) for outcome in GRADES}
    metrics["sampling/request_failures"] = sum(request_failures.values())
    metrics |= {f"sampling/{name}": collected.counts.get(name, 0) for name in COUNTS}
    metrics["sampling/window_low"], metrics["sampling/window_high"] = collected.window
    metrics |= _ages(collected, version)
    wasted = wasted_tokens(collected)
    metrics |= {f"tokens/wasted_{reason}": wasted[reason] for reason in WASTE}
    metrics |= {f"time/{name}": clock.get(name, 0.0) for name in STAGES}
    return metrics


def source_metrics(collected: Collected) -> dict[str, float]:
    """Of each of several data sources: the groups of it that finished, their accuracy and length, and the
    groups that are trained on.
    """
    by_source: dict[str, list[GroupFacts]] = {}
    for facts in collected.sampled:
        if facts.source is not None:
            by_source.setdefault(facts.source, []).append(facts)
    trained = Counter(group.prompt.source for group in collected.groups)
    metrics: dict[str, float] = {}
    for source in sorted({*by_source, *(name for name in trained if name is not None)}):
        sampled = by_source.get(source, [])
        metrics[f"source/{source}/groups_sampled"] = len(sampled)
        metrics[f"source/{source}/groups_accepted"] = trained[source]
        if sampled:
            metrics[f"source/{source}/accuracy"] = fmean(_accuracies(sampled))
            lengths = [length for facts in sampled for length in facts.lengths]
            metrics[f"source/{source}/length_mean"] = fmean(lengths)
    return metrics


def _graded_rewards(groups: Sequence[Group]) -> list[float]:
    """0 where nothing was graded."""
    pairs = [pair for group in groups for pair in zip(group.correct, group.rewards, strict=True)]
    return [reward for correct, reward in pairs if correct is not None] or [0.0]


def _accuracies(groups: Sequence[Group | GroupFacts]) -> list[float]:
    return [group.accuracy for group in groups if not math.isnan(group.accuracy)] or [0.0]


def wasted_tokens(collected: Collected) -> Counter[str]:
    """Response tokens of this step's groups that are never trained on, by reason (WASTE). A group that waits
    for a later step is wasted if that one will pass it over. What aborted requests had generated is unknown.
    """
    wasted: Counter[str] = Counter()
    # With sampling.max_age=0 whatever lies behind the last trained group is dropped.
    strict = collected.counts.get("surplus_dropped", 0) > 0
    end = max((group.prompt.position for group in collected.groups), default=-1)
    for facts in collected.sampled:
        if strict and facts.position > end:
            wasted["surplus"] += sum(facts.lengths)
        elif facts.verdict != "accepted":
            wasted[facts.verdict] += sum(facts.lengths)
    return wasted


def _ages(collected: Collected, version: int) -> dict[str, float]:
    """A group is as old as its oldest token, in steps."""
    ages = [version - group.weight_version for group in collected.groups]
    return {
        "sampling/age_mean": fmean(ages),
        "sampling/age_max": max(ages),
        "sampling/overdue_share": collected.counts.get("overdue", 0) / len(ages),
    }
