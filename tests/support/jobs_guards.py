"""What ranks do in tests/policy/test_guards.py: updates with one bad value each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dapo.metrics import flatten
from support.cases import PolicyRun, plan
from support.jobs_policy import digest, open_policy, part_of
from support.samples import make_samples

EARLIER, NAME = "decoder.layers.0.self_attention.linear_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"
BAD_SAMPLE, BAD_TOKEN = 2, 9  # the sample has 6 prompt tokens


@dataclass(frozen=True, kw_only=True)
class Poison:
    """One bad value for the time of an update, or none: an advantage of sample BAD_SAMPLE (on the rank that
    has it), or on one rank gradients of `names`, the parameter NAME before the update, or the same parameter
    after it. empty: the update has no trained token.
    """

    advantage: float | None = None
    gradient: float | None = None
    parameter: float | None = None
    after: float | None = None
    empty: bool = False
    rank: int = 0
    names: Sequence[str] = (EARLIER, NAME)


@dataclass(frozen=True, kw_only=True)
class PoisonedRun:
    """A fresh policy of a layout, and its updates one after the other."""

    layout: str
    updates: Sequence[Poison]
    overrides: Sequence[str] = ()


@contextlib.contextmanager
def poisoned(policy: Any, batch: Any, poison: Poison) -> Iterator[None]:
    from megatron_dapo.policy.model import named_shards

    advantages_T, optimizer, hooks = batch.advantages_T.clone(), policy.optimizer, []
    if poison.advantage is not None:
        for i in ((batch.prompt_N == 0) & (batch.number_N == BAD_SAMPLE)).nonzero().flatten().tolist():
            batch.advantages_T[sum(batch.lengths[:i]) + BAD_TOKEN] = poison.advantage
    if policy.session.rank == poison.rank:
        named = dict(named_shards(policy.chunks))
        if poison.gradient is not None:
            for name in named.keys() & set(poison.names):
                hooks.append(named[name].register_hook(lambda g: torch.full_like(g, poison.gradient)))
        if poison.parameter is not None:
            named[NAME].data.view(-1)[5] = poison.parameter
        if poison.after is not None:
            step = optimizer.step_with_ready_grads
            optimizer.step_with_ready_grads = lambda: (step(), named[NAME].data.fill_(poison.after))
    yield
    batch.advantages_T.copy_(advantages_T)
    for hook in hooks:
        hook.remove()


def update(policy: Any, batch: Any, poison: Poison) -> dict[str, Any]:
    """One update, poisoned on the way, and what became of it on this rank."""
    from megatron_dapo.policy.guards import NotFinite

    with poisoned(policy, batch, poison):
        before, rate, message, result = digest(policy), policy.optimizer.param_groups[0]["lr"], "", None
        try:
            result = policy.update(without_tokens(batch) if poison.empty else batch, 0)
        except NotFinite as error:
            message = str(error)
        return {
            "raised": message,
            "warnings": list(result.warnings) if result else [],
            "skipped": flatten(result.metrics)["skipped_updates"] if result else None,
            "says_skipped": result.skipped if result else None,
            "tokens": result.num_tokens if result else None,
            "grad_norm": result.grad_norm if result else None,
            "untouched": digest(policy) == before,
            "same_rate": policy.optimizer.param_groups[0]["lr"] == rate,
            "num_updates": policy.num_updates,
        }


def without_tokens(batch: Any) -> Any:
    """Every response masked, as overlong filtering does."""
    (mini,) = batch.mini_batches
    mini = dataclasses.replace(mini, num_tokens=0, denominator=0)
    masked_T = torch.zeros_like(batch.response_mask_T)
    return dataclasses.replace(batch, response_mask_T=masked_T, mini_batches=(mini,))


def run_poisoned(model: str, folder: str, runs: dict[str, PoisonedRun]) -> dict[str, Any]:
    reports = {}
    for name, run in runs.items():
        overrides = ["optimizer.warmup_updates=9", "optimizer.lr=1e-3", *run.overrides]
        policy_run = PolicyRun(name=name, model=model, layout=run.layout, overrides=overrides)
        with open_policy(policy_run, f"{folder}/{name}.store") as policy:
            if policy is None:
                continue
            batch = part_of(policy, plan(make_samples(), policy.session.layout, num_updates=1, budget="half"))
            reports[name] = [update(policy, batch, poison) for poison in run.updates]
    return reports
