"""Everything a run needs to continue exactly: model, optimizer, schedule, random state, the guard's memory,
and what the controller knows.

`<run.dir>/checkpoints/step_000012/` holds Megatron's distributed checkpoint (any data-parallel size may load
it), `run.pt`, which every rank reads, and `carried.pt`, the controller's part, which rank 0 reads: groups and
beginnings of responses, of any size. A folder gets its name only when it is whole, so a crash while saving
leaves the previous one usable.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dapo.errors import UserError
from megatron_dapo.policy.model import gather_weights
from megatron_dapo.policy.optimizer import load_optimizer
from megatron_dapo.policy.session import Session
from megatron_dapo.policy.step import Policy
from megatron_dapo.sync.export import export

FORMAT = 2  # of run.pt and carried.pt
_NAME = re.compile(r"step_(\d{6})$")
# loads at any data-parallel size, all other sizes alike
_SHARDING = {"distrib_optim_sharding_type": "dp_reshardable"}
# Saves are synchronous, so their results may stay in this process. Megatron's own queue is a server process
# of every rank, which takes seconds to start and outlives a kill -9.
filesystem_async._results_queue = queue.Queue()


class SaveFailed(UserError):
    """A checkpoint could not be written; the previous one is untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run continues from beside the policy. rollouts: the controller's part (Rollouts.state); None on
    other ranks than 0.
    """

    step: int
    rollouts: dict[str, Any] | None


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to continue from. `resume` is 'auto', 'never' or a folder; UserError when that folder
    is not one.
    """
    if resume == "never":
        return None
    if resume == "auto":
        complete = _complete(run_dir / "checkpoints")
        return complete[-1] if complete else None
    folder = Path(resume)
    if not (folder / "run.pt").is_file():
        raise UserError(
            f"checkpoint.resume={resume} is no complete checkpoint (it has no run.pt); use 'auto', 'never' "
            f"or a step_* folder"
        )
    return folder


def choose(run_dir: Path, resume: str, session: Session) -> tuple[Path | None, RunState | None]:
    """Collective. The checkpoint to continue from and its state. Rank 0 decides for all: on a network file
    system hosts may see a new folder at different times.
    """
    folder = session.channel.share(find(run_dir, resume) if session.rank == 0 else None)
    return folder, read_state(folder, session.rank) if folder else None


def save(run_dir: Path, policy: Policy, state: RunState | None, keep: int) -> Path:
    """Collective. Write a checkpoint of the step, then delete all but the newest `keep`.

    `state` is given on rank 0. SaveFailed on all ranks when any rank could not write.
    """
    session = policy.session
    step: list[Any] = [state.step if state else None]
    dist.broadcast_object_list(step, src=0, group=session.control)
    final = (run_dir / "checkpoints" / f"step_{step[0]:06d}").resolve()
    temporary = final.with_name(final.name + ".tmp")
    error: BaseException | None = None
    try:
        if session.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except OSError as failure:
        error = failure
    _fail_together(error, temporary, session)
    try:
        dist_checkpointing.save(_sharded_state(policy), str(temporary), content_metadata=_SHARDING)
        if session.rank == 0:
            assert state is not None
            torch.save(state.rollouts, temporary / "carried.pt")
            rest = {
                "format": FORMAT,
                "step": state.step,
                "rng": torch.get_rng_state(),
                "num_updates": policy.num_updates,
                "guard": policy.guard.state(),
            }
            torch.save(rest, temporary / "run.pt")
    except (Exception, CheckpointException) as failure:
        error = failure  # whatever layer reports a full disk; a CheckpointException is a BaseException
    _fail_together(error, temporary, session)
    if session.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in _complete(run_dir / "checkpoints")[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier(group=session.control)
    return final


def set_aside(run_dir: Path, step: int) -> Path | None:
    """Move the run folder's checkpoints away when some are of a later step than the run starts from: they are
    of another run, and the newest are kept and resumed from. Returns where to. Rank 0 only, when all ranks
    have loaded theirs.
    """
    folder = run_dir / "checkpoints"
    if not any(int(_NAME.search(p.name)[1]) > step for p in _complete(folder)):  # type: ignore[index]
        return None
    number = next(n for n in itertools.count(1) if not folder.with_name(f"checkpoints.{n}").exists())
    return folder.rename(folder.with_name(f"checkpoints.{number}"))


def read_state(folder: Path, rank: int) -> RunState:
    """What `save` was given as the state. UserError for a checkpoint of an earlier version."""
    step = _read_rest(folder)["step"]
    rollouts = torch.load(folder / "carried.pt", weights_only=False) if rank == 0 else None
    return RunState(step=step, rollouts=rollouts)


@torch.no_grad()
def load(folder: Path, policy: Policy) -> None:
    """Collective. Put model, optimizer, schedule and random state back. UserError for a checkpoint of an
    earlier version.
    """
    rest = _read_rest(folder)
    sharded = _sharded_state(policy, is_loading=True)
    loaded: Any = dist_checkpointing.load(sharded, str(folder.resolve()))
    for number, chunk in enumerate(policy.chunks):
        chunk.module.load_state_dict(loaded["model"][str(number)])
    load_optimizer(policy.optimizer, loaded["optimizer"])
    policy.schedule.load_state_dict(loaded["schedule"])
    torch.set_rng_state(rest["rng"])
    policy.num_updates = rest["num_updates"]
    policy.guard.load_state(rest["guard"])
    dist.barrier(group=policy.session.control)  # all have read it


def _read_rest(folder: Path) -> dict[str, Any]:
    """run.pt."""
    rest = torch.load(folder / "run.pt", weights_only=False)
    if rest.get("format") != FORMAT:
        raise UserError(
            f"checkpoint.resume: {folder} was written by another version, which keeps its rollouts in "
            "another form; start a new run with another run.dir, or go on with that version"
        )
    return rest


def export_hf(run_dir: Path, policy: Policy) -> Path:
    """Collective. Write the weights as a Hugging Face checkpoint with tokenizer, in the folder that is
    returned.
    """
    folder, session = run_dir / "hf", policy.session
    shards, dtype = policy.weight_shards(), policy.config.model.dtype
    export(shards, policy.spec, dtype, session.rank, session.control, folder, policy.folder)
    return folder


def _sharded_state(policy: Policy, *, is_loading: bool = False) -> dict[str, Any]:
    gather_weights(policy.chunks)

    def model() -> dict[str, Any]:
        modules: list[Any] = [chunk.module for chunk in policy.chunks]
        return {str(number): module.sharded_state_dict() for number, module in enumerate(modules)}

    optimizer = policy.optimizer.sharded_state_dict(model(), is_loading=is_loading, metadata=_SHARDING)
    return {"model": model(), "optimizer": optimizer, "schedule": policy.schedule.state_dict()}


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if _NAME.search(p.name) and (p / "run.pt").is_file())


def _fail_together(error: BaseException | None, temporary: Path, session: Session) -> None:
    """Collective. SaveFailed on every rank if any rank has an error."""
    errors: list[Any] = [None] * dist.get_world_size()
    own = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(errors, own, group=session.control)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
    if failed:
        if session.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailed(
            f"could not save {temporary.with_suffix('')} ({'; '.join(failed)[:2000]}); free space on that "
            "disk or set run.dir, then resume; the previous checkpoint is untouched"
        ) from error
