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
