"""What ranks do in the tests of objectives and of what they are made of: log-probabilities of a sharded
vocabulary, importance weights over split sequences, updates with another objective than DAPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.batching.logprobs import logprobs_from_hidden
from megatron_dapo.objectives.mismatch import importance_weights
from support.cases import PolicyRun


def weights_of_alternate_tokens(
    old: list[float], rollout: list[float], samples: list[int], num_samples: int
) -> list[float]:
    """The sequence weights of this rank's tokens; the ranks hold alternate tokens of the same samples."""
    dist.init_process_group("gloo")
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    streams = (torch.tensor(values[mine], dtype=torch.float64) for values in (old, rollout))
    return importance_weights(
        *streams,
        torch.tensor(samples[mine]),
        level="sequence",
        num_samples=num_samples,
        group=dist.group.WORLD,
    ).tolist()


def logprobs_of_shards(
    hidden: list, weight: list, labels: list, arriving: list, options: dict[str, Any]
) -> list[list]:
    """`logprobs_from_hidden` where each rank has an equal part of the vocabulary rows: log-probabilities,
    entropy, and this rank's gradients of hidden states and weight.
    """
    dist.init_process_group("gloo")
    rows = len(weight) // dist.get_world_size()
    first = rows * dist.get_rank()
    leaves = [torch.tensor(x, requires_grad=True) for x in (hidden, weight[first : first + rows])]
    logprobs, entropy = logprobs_from_hidden(
        *leaves, torch.tensor(labels), first=first, group=dist.group.WORLD, **options
    )
    gradients = torch.autograd.grad((logprobs * torch.tensor(arriving)).sum(), leaves)
    return [x.tolist() for x in (logprobs, entropy, *gradients)]


def measure_reinforce(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """`jobs_policy.measure` of runs with objective.kind=reinforce, which the import registers here."""
    import support.reinforce  # noqa: F401
    from support.jobs_policy import measure

    return measure(runs, {}, folder)


def measure_gradients(
    runs: Sequence[PolicyRun], cases: dict[str, list[str]], folder: str
) -> dict[str, dict[str, Any]]:
    """By run and case (overrides of the section objective): loss, gradient norm and the norm of each
    parameter's gradient on this rank, of one mini-batch at the weights that the model starts with.
    """
    from megatron_dapo.config import RunConfig
    from megatron_dapo.metrics import Columns, flatten
    from megatron_dapo.objectives import make_objective
    from megatron_dapo.policy.optimizer import ready_gradients
    from megatron_dapo.policy.step import metrics_of
    from support.jobs_policy import open_policy, part_of

    reports: dict[str, dict[str, Any]] = {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            reports[run.name] = {}
            for name, overrides in cases.items():
                config = RunConfig.load(None, [*run.arguments(), *overrides]).objective
                policy.objective = make_objective(config)
                policy.columns = Columns.of(metrics_of(policy.objective))
                whole = batch_with_streams(policy.session.layout, run, policy.objective)
                batch = policy.streams(part_of(policy, whole))
                for chunk in policy.chunks:
                    chunk.zero_grad_buffer()
                policy.optimizer.zero_grad()
                mini = batch.mini_batches[0]
                totals = policy._reduce(
                    policy.run_schedule(batch, 0, policy._loss_function(mini), forward_only=False)
                )
                norms = [float(p.main_grad.norm()) for chunk in policy.chunks for p in chunk.parameters()]
                reports[run.name][name] = {
                    "loss": totals.loss / (mini.denominator - totals.excluded),
                    "grad_norm": ready_gradients(policy.optimizer),
                    "norms": norms,
                    "metrics": flatten(totals.metrics),
                }
    return reports


def batch_with_streams(layout: Any, run: PolicyRun, objective: Any) -> Any:
    """The samples of every test, with old and reference log-probabilities around those of the engine, and the
    streams that an objective makes of groups.
    """
    import dataclasses

    from megatron_dapo.types import Stream
    from support.cases import plan
    from support.samples import make_samples

    draw = torch.Generator().manual_seed(11)
    samples, old, reference = [], [], []
    for i, sample in enumerate(make_samples()):
        length = len(sample.tokens)
        streams = {
            Stream.LM_WEIGHTS: torch.full((length,), 1.5 * (i % 2)),
            Stream.HIGH_COVARIANCE: (torch.rand(length, generator=draw) < 0.2).float(),
        }
        samples.append(dataclasses.replace(sample, streams=streams))
        old.append(sample.rollout_logprobs + 0.2 * torch.randn(length, generator=draw))
        reference.append(sample.rollout_logprobs + 0.5 * torch.randn(length, generator=draw))
    batch = plan(samples, layout, num_updates=1, budget=run.budget, denominator=objective.denominator)
    batch = batch.with_stream(Stream.OLD_LOGPROBS, torch.cat(old))
    return batch.with_stream(Stream.REFERENCE_LOGPROBS, torch.cat(reference))
