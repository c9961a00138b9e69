"""What ranks do in the tests of the session and of several models in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.errors import UserError
from megatron_dapo.layout import Layout
from megatron_dapo.objectives import make_objective
from support.cases import PolicyRun, plan
from support.jobs_policy import digest, open_session, part_of
from support.samples import make_samples


def train_beside_a_reference(run: PolicyRun, reference: str, folder: str) -> dict[str, Any]:
    """A policy and a frozen model of another checkpoint in one process: log-probabilities of both before and
    after an update of the policy, and what changed.
    """
    from megatron_dapo.config import RunConfig
    from megatron_dapo.policy.runner import frozen_model
    from megatron_dapo.policy.step import Policy

    with open_session(run.layout, f"{folder}/{run.name}.store") as session:
        config = RunConfig.load(None, run.arguments())
        policy = Policy(config, session, make_objective(config.objective))
        frozen = frozen_model(config, session, reference)
        batch = part_of(policy, plan(make_samples(), session.layout, num_updates=1, budget="half"))
        models = {"policy": policy, "reference": frozen}
        before = {name: model.logprobs(batch).tolist() for name, model in models.items()}
        weights, state = weights_of(frozen), digest(policy)
        policy.update(batch, 0)
        after = {name: model.logprobs(batch).tolist() for name, model in models.items()}
        return {
            "before": before,
            "after": after,
            "reference_kept": all(map(torch.equal, weights, weights_of(frozen))),
            "policy_moved": digest(policy) != state,
            "reference_trains": any(p.requires_grad for chunk in frozen.chunks for p in chunk.parameters()),
        }


def weights_of(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in model.chunks for p in chunk.parameters()]


def describe_session(layout: str, folder: str) -> dict[str, Any]:
    """Where this rank stands, whom its replica's group reaches, and what a second start answers."""
    from megatron_dapo.policy import session as session_file
    from megatron_dapo.policy.backend import CPU, GPU

    with open_session(layout, f"{folder}/session.store") as session:
        replica = torch.zeros(session.world_size, dtype=torch.int64)
        replica[session.rank] = 1
        dist.all_reduce(replica, group=session.replica_group)
        refusals = []
        for other, backend in ((Layout(tp=session.world_size), CPU), (session.layout, GPU)):
            try:
                session_file.start(other, backend)
            except UserError as error:
                refusals.append(str(error))
        return {
            "coordinates": [session.tp_rank, session.cp_rank, session.dp_rank, session.pp_rank],
            "replica": replica.nonzero().flatten().tolist(),
            "leader": session.replica_leader,
            "same": session_file.start(session.layout, CPU) is session,
            "refusals": refusals,
            "shared": session.channel.share("decided" if session.rank == 0 else None),
        }
