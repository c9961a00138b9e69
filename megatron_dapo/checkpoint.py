"""Everything a run needs to continue exactly: model, optimizer, schedule, random state, the guard's memory,
and what the controller knows.

`<run.dir>/checkpoints/step_000012/` holds Megatron's distributed checkpoint of model and optimizer, which
any layout may load, `run.pt`, which every rank reads, and `carried.pt`, the controller's part, which rank 0
reads: groups and beginnings of responses, of any size. A folder gets its name only when it is whole, so a
crash while saving leaves the previous one usable.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dapo.checkpoint_writer import CheckpointWriter
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.policy.model import gather_weights
from megatron_dapo.policy.optimizer import set_steps
from megatron_dapo.policy.optimizer_state import sharded_optimizer
from megatron_dapo.policy.session import Session
from megatron_dapo.policy.step import Policy
from megatron_dapo.policy.trained import TrainedModel
from megatron_dapo.report.model_card import model_card
from megatron_dapo.sync.export import export

FORMAT = 5  # of run.pt, carried.pt and the optimizer's tensors
_NAME = re.compile(r"step_(\d{6})$")


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


def save(
    run_dir: Path, policy: Policy, state: RunState | None, keep: int, writer: CheckpointWriter | None = None
) -> Path:
    """Collective. Write a checkpoint of the step, then delete all but the newest `keep`; in the background
    with a `writer` that works there.

    `state` is given on rank 0. SaveFailed on all ranks when any rank could not write this one, or the one
    before in the background.
    """
    writer = writer or CheckpointWriter(policy.session, in_background=False)
    step = policy.session.channel.share(state.step if state else None)
    checkpoints = (run_dir / "checkpoints").resolve()
    files = None
    if state:
        rest = {
            "format": FORMAT,
            "step": state.step,
            "rng": torch.get_rng_state(),
            **_progress(policy),
            "value_model": _progress(policy.value_model) if policy.value_model else None,
            "reference": policy.reference.digest if policy.reference else None,
            "fp8_scales": _scales(policy),
        }
        files = {"carried.pt": state.rollouts, "run.pt": rest}
    folder = checkpoints / f"step_{step:06d}"
    writer.write(folder, _sharded_state(policy), files, done=lambda: _delete_old(checkpoints, keep))
    return folder


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
    """Collective. Put model, optimizer, schedule and random state back, also of a value model. UserError for
    a checkpoint of an earlier version, or with other models beside the policy.
    """
    rest = _read_rest(folder)
    _check_models(folder, policy, rest)
    scales = _scales(policy)
    extra_states = scales is not None and rest.get("fp8_scales", scales) == scales
    loaded = _read(folder.resolve(), policy, extra_states=extra_states)
    _restore(policy, loaded["model"], rest)
    if policy.value_model:
        _restore(policy.value_model, loaded["value_model"], rest["value_model"])
    torch.set_rng_state(rest["rng"])
    dist.barrier(group=policy.session.control)  # all have read it


def _progress(model: TrainedModel) -> dict[str, Any]:
    """What a checkpoint keeps of a model beside its tensors."""
    return {
        "schedule": model.schedule.state_dict(),
        "num_updates": model.num_updates,
        "guard": model.guard.state(),
    }


def _restore(model: TrainedModel, weights: Any, progress: dict[str, Any]) -> None:
    """`weights` by chunk; most of them, and the optimizer's state, are in their place already."""
    for number, chunk in enumerate(model.chunks):
        chunk.module.load_state_dict(weights[str(number)])
    set_steps(model.optimizer, progress["num_updates"])
    model.schedule.load_state_dict(progress["schedule"])
    model.num_updates = progress["num_updates"]
    model.guard.load_state(progress["guard"])


def _check_models(folder: Path, policy: Policy, rest: dict[str, Any]) -> None:
    """UserError when the checkpoint lacks the value model, or was made with another reference."""
    if policy.value_model and not rest.get("value_model"):
        raise UserError(
            f"checkpoint.resume: {folder} has no value model, which objective.kind="
            f"{policy.config.objective.kind} trains; start a new run from its export (model.path)"
        )
    if policy.reference and rest.get("reference") not in (None, policy.reference.digest):
        config = policy.config
        raise UserError(
            f"checkpoint.resume: {folder} was made with another reference model than what is now in "
            f"{config.objective.reference or config.model.path}; set objective.reference to the folder with "
            "those weights"
        )


def _read_rest(folder: Path) -> dict[str, Any]:
    """run.pt."""
    rest = torch.load(folder / "run.pt", weights_only=False)
    if rest.get("format") != FORMAT:
        raise UserError(
            f"checkpoint.resume: {folder} was written by another version (format {rest.get('format')}, this "
            f"one reads {FORMAT}); start a new run with another run.dir, or go on with that version"
        )
    return rest


def _scales(policy: Policy) -> str | None:
    """Whose delayed scales are in the extra states of the layers: those of 'gpu' or 'cpu', which cannot read
    the other's. None: there are none, and nothing else is in those states.
    """
    fp8 = policy.config.policy.fp8
    return policy.session.backend.name if fp8 and fp8.recipe == "delayed" else None


def _read(folder: Path, policy: Policy, *, extra_states: bool) -> Any:
    """Collective. Megatron's load, which puts most values into the live tensors; without `extra_states` those
    stay as they are, whether the checkpoint has any or not. UserError for files that are missing or damaged.
    """
    channel, remedy = policy.session.channel, "; take it away to resume from the one before"
    if damage := channel.share(_damage(folder) if policy.session.rank == 0 else None):
        raise UserError(f"checkpoint.resume: {folder} is damaged: {damage}{remedy}")
    state = _sharded_state(policy)
    if not extra_states:
        dict_list_map_inplace(
            lambda entry: LocalNonpersistentObject(entry.data) if isinstance(entry, ShardedObject) else entry,
            state,
        )
    try:
        return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException) as error:
        cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        text = f"{type(cause).__name__}: {str(cause)[:500]}"
        raise UserError(f"checkpoint.resume: {folder} cannot be read ({text}){remedy}") from error


def _damage(folder: Path) -> str | None:
    """A file that is missing or too short, and a tensor that it lacks."""
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data or {}
    except Exception as error:  # pickle's
        return f".metadata cannot be read ({type(error).__name__}: {error})"
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    for index, place in stored.items():
        file, end = place.relative_path, place.offset + place.length
        if (size := sizes.get(file, -1)) < end:
            found = f"has {size} bytes" if size >= 0 else "is missing"
            return f"{file} {found}, and should hold {index.fqn} up to byte {end}"
    return None


def export_hf(folder: Path, policy: Policy, step: int) -> Path:
    """Collective. Write the weights as a Hugging Face checkpoint with tokenizer and model card."""
    session, config = policy.session, policy.config
    metrics = Path(config.run.dir) / "metrics.jsonl"
    card = model_card(config, step, metrics) if session.rank == 0 else None
    shards, dtype = policy.weight_shards(), config.model.dtype
    export(shards, policy.spec, dtype, session.rank, session.control, folder, policy.folder, card=card)
    return folder


class Keeper:
    """Checkpoints and exports of a run, when its configuration says. All ranks call the same."""

    def __init__(self, config: RunConfig, session: Session, step: int) -> None:
        self._options, self._run_dir = config.checkpoint, Path(config.run.dir)
        self._writer = CheckpointWriter(session, in_background=self._options.async_save)
        self._saved_step = step  # a fresh run counts as saved

    def keep(
        self, policy: Policy, step: int, state: Callable[[], RunState | None], say: Callable[[str], None]
    ) -> None:
        """What is due after the step. SaveFailed also when the last save in the background has failed."""
        self._writer.poll()
        if _due(self._options.every_steps, step):
            self.save(policy, step, state)
        if _due(self._options.export_every, step):
            exports = self._run_dir / "exports"
            say(f"exported {export_hf(exports / f'step_{step:06d}', policy, step)}")
            if policy.session.rank == 0 and self._options.keep_exports:
                _delete_old(exports, self._options.keep_exports, "config.json")

    def save(
        self, policy: Policy, step: int, state: Callable[[], RunState | None], *, wait: bool = False
    ) -> None:
        """A checkpoint of the step unless there is one, complete on return with `wait`. SaveFailed as in
        `save`.
        """
        if step != self._saved_step:
            save(self._run_dir, policy, state(), self._options.keep, self._writer)
            self._saved_step = step
        if wait:
            self._writer.finish()


def _due(every: int, step: int) -> bool:
    """Whether something that is done every so many steps (0: never) comes after this one."""
    return every > 0 and step > 0 and step % every == 0


def _sharded_state(policy: Policy) -> dict[str, Any]:
    """Model and optimizer as tensors of the whole model, of which this rank has parts; the same of the value
    model, whose tensors are named apart.
    """
    state: dict[str, Any] = {}
    for model, prefix in zip(policy.trained_models(), ("", "value_"), strict=False):
        gather_weights(model.chunks)
        modules: list[Any] = [chunk.module for chunk in model.chunks]
        weights = {str(number): module.sharded_state_dict() for number, module in enumerate(modules)}
        if model.spec.num_experts:
            _name_norms_alike(weights)
        add_prefix_for_sharding(weights, f"{prefix}model." if prefix else "")
        state[f"{prefix}model"] = weights
        state[f"{prefix}optimizer"] = sharded_optimizer(model.optimizer, weights)
    return state


def _name_norms_alike(weights: Any) -> None:
    """Give the norm before experts the name that TransformerEngine's layers have for it, as every other norm
    has: the local layers save it under that of a dense mlp's.
    """
    for entry in cast("Iterator[Any]", nested_values(weights)):
        if isinstance(entry, ShardedTensor):
            entry.key = entry.key.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")


def _complete(folder: Path, last_file: str = "run.pt") -> list[Path]:
    """Complete checkpoints (or exports), oldest first."""
    return sorted(p for p in folder.glob("step_*") if _NAME.search(p.name) and (p / last_file).is_file())


def _delete_old(folder: Path, keep: int, last_file: str = "run.pt") -> None:
    for old in _complete(folder, last_file)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
