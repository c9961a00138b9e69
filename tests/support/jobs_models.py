"""What ranks do in the tests of models beside the policy: updates of ppo and dpo at any layout, a checkpoint
of them, their state away from the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.types import Batch, Sample, Stream
from support.cases import PolicyRun, plan
from support.jobs_policy import described, digest, open_policy, part_of
from support.samples import make_samples


def samples_with_rewards() -> list[Sample]:
    """As objectives/ppo.py makes them: the reward of a response on all of its tokens."""
    return make_samples()


def samples_in_pairs() -> list[Sample]:
    """As objectives/dpo.py makes them: best and worst of a prompt, one after the other."""
    samples = make_samples(12, seed=1)
    for i, sample in enumerate(samples):
        sample.response_mask.copy_(sample.rollout_logprobs != 0)  # also of the one that is masked out whole
        sample.advantages.fill_(1.0 if i % 2 == 0 else -1.0)
        object.__setattr__(sample, "prompt_position", 1000 + i // 2)
    return samples


def samples_of(policy: Any) -> list[Sample]:
    return samples_with_rewards() if policy.value_model else samples_in_pairs()


def measure(runs: Sequence[PolicyRun], head: list[float], folder: str) -> dict[str, Any]:
    """Two steps of every run, each with the streams of before it. `head`: where the value model's scalar
    starts.
    """
    reports = {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            set_head(policy, head)
            steps = [_step(policy, run) for _ in range(2)]
            reports[run.name] = {"steps": steps, "reference": getattr(policy.reference, "digest", None)}
    return reports


def _step(policy: Any, run: PolicyRun) -> dict[str, Any]:
    before, batch = digest(policy), streams_of(policy, run)
    names = [name for name in (Stream.VALUES, Stream.RETURNS, Stream.MARGINS) if name in batch.streams]
    streams = {name: whole(policy, run, batch.streams[name]) for name in names}
    streams["advantages"] = whole(policy, run, batch.advantages_T)
    results = [described(policy.update(batch, k)) for k in range(run.num_updates)]
    return {"streams": streams, "results": results, "policy_moved": digest(policy) != before}


def streams_of(policy: Any, run: PolicyRun) -> Batch:
    return policy.streams(part_of(policy, batch_of(policy, run)))


def batch_of(policy: Any, run: PolicyRun) -> Batch:
    return plan(
        samples_of(policy),
        policy.session.layout,
        num_updates=run.num_updates,
        budget=run.budget,
        denominator=policy.objective.denominator,
    )


def whole(policy: Any, run: PolicyRun, part_T: torch.Tensor) -> list[float]:
    """The parts of all data-parallel ranks put together, all samples end to end."""
    batch = batch_of(policy, run)
    parts: list[Any] = [None] * policy.session.world_size
    dist.all_gather_object(parts, (policy.session.dp_rank, part_T.tolist()), group=policy.session.control)
    flat_T = torch.zeros(sum(batch.lengths))
    starts = [0, *itertools.accumulate(batch.lengths)]
    for dp_rank, values in parts:
        mine = sorted(i for m in batch.mini_batches for micro in m.micro_batches[dp_rank] for i in micro)
        flat_T[torch.cat([torch.arange(starts[i], starts[i + 1]) for i in mine])] = torch.tensor(values)
    return torch.where(batch.response_mask_T, flat_T, 0.0).tolist()


@torch.no_grad()
def set_head(policy: Any, head: list[float]) -> None:
    from megatron_dapo.policy.model import named_shards
    from megatron_dapo.policy.value import HEAD

    if policy.value_model:
        for name, parameter in named_shards(policy.value_model.chunks):
            if name == HEAD:
                parameter.copy_(torch.tensor(head))


def save_and_resume(run: PolicyRun, other: PolicyRun, head: list[float], folder: str) -> dict[str, Any]:
    """A step, the state away and back, a checkpoint, another step: what a policy has that does all of it, one
    that loads the checkpoint, and one of another layout that does; what one with another reference answers.
    """
    from megatron_dapo import checkpoint
    from megatron_dapo.policy.offload import to_device, to_host

    found: dict[str, Any] = {}
    with open_policy(run, f"{folder}/save.store") as policy:
        set_head(policy, head)
        _step(policy, run)
        before = digests(policy)
        to_host(policy)
        state = checkpoint.RunState(step=1, rollouts={}) if policy.session.rank == 0 else None
        checkpoint.save(Path(folder), policy, state, keep=1)
        to_device(policy)
        found["offloading_kept"] = digests(policy) == before
        found["went_on"] = [_step(policy, run), digests(policy)]
    for name, resumed in (("resumed", run), ("at_another_layout", other)):
        with open_policy(resumed, f"{folder}/{name}.store") as policy:
            saved = checkpoint.find(Path(folder), "auto")
            assert saved is not None
            checkpoint.load(saved, policy)
            found[name] = [_step(policy, resumed), digests(policy)]
            policy.reference.digest = "0"
            try:
                checkpoint.load(saved, policy)
            except UserError as error:
                found["refusal"] = str(error)
    return found


def digests(policy: Any) -> list[str]:
    return [digest(model) for model in policy.trained_models()]
