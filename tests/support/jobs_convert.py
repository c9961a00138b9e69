"""What ranks do in tests/convert: save weights in the formats that Megatron writes, load a converted one."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.cases import PolicyRun
from support.jobs_policy import export, open_policy

SINGLETON = {"singleton_local_shards": True}


def save_and_load(
    saved: Sequence[PolicyRun], loaded: Sequence[PolicyRun], checkpoints: dict[str, str], folder: str
) -> None:
    """Save the weights of each run of `saved` as `folder`/name/{torch_dist,singleton,legacy}; put the
    checkpoint of `checkpoints` (by name) into the policy of each run of `loaded`, and export it to
    `folder`/name.
    """
    from megatron.core import dist_checkpointing

    for run in saved:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is not None:
                save(policy, Path(folder) / run.name)
    for run in loaded:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is not None:
                state: Any = dist_checkpointing.load(_model_part(policy), checkpoints[run.name])
                for number, chunk in enumerate(policy.chunks):
                    chunk.module.load_state_dict(state["model"][str(number)])
                export(policy, Path(folder) / run.name)


def save(policy: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    for name, metadata in (("torch_dist", None), ("singleton", SINGLETON)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(_model_part(policy, metadata), str(folder / name))
    _save_legacy(policy, folder / "legacy")


def _model_part(policy: Any, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """As in `megatron_dapo.checkpoint`, without optimizer and schedule."""
    chunks = enumerate(policy.chunks)
    return {
        "model": {str(number): chunk.module.sharded_state_dict(metadata=metadata) for number, chunk in chunks}
    }


def _save_legacy(policy: Any, folder: Path) -> None:
    """As Megatron-LM's training does with --ckpt-format torch."""
    from megatron.core import parallel_state

    session, layout = policy.session, policy.session.layout
    if session.dp_rank and layout.ep == 1:
        return
    name = f"mp_rank_{session.tp_rank:02d}" + (f"_{session.pp_rank:03d}" if layout.pp > 1 else "")
    if layout.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    args = argparse.Namespace(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        rank_settings=dataclasses.field,  # something that is no plain value
    )
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    for number, chunk in enumerate(policy.chunks):
        key = f"model{number}" if len(policy.chunks) > 1 else "model"
        state[key] = chunk.module.state_dict_for_save_checkpoint()
    target = folder / "iter_0000007" / name
    target.mkdir(parents=True, exist_ok=True)
    torch.save(state, target / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
