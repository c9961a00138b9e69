"""What ranks do in tests/invariance/test_resume.py: save in the middle of a run, go on from there at any
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dapo.checkpoint import RunState
from support.cases import PolicyRun, plan
from support.jobs_policy import export, open_policy, part_of
from support.samples import make_samples

UPDATES = 3  # after the checkpoint


def train_save_go_on(runs: Sequence[PolicyRun], folder: str) -> dict[str, Any]:
    """Two updates of every run, a checkpoint in the folder of its name, and three more updates."""
    from megatron_dapo import checkpoint

    reports: dict[str, Any] = {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            for number in range(2):
                _update(policy, number)
            checkpoint.save(Path(folder) / run.name, policy, _state(policy), keep=1)
            reports[run.name] = _go_on(policy, Path(folder) / run.name)
    return reports


def load_save_go_on(runs: Sequence[PolicyRun], saved_by: dict[str, str], folder: str) -> dict[str, Any]:
    """Load the checkpoint of another run (`saved_by`, by name), save what was loaded as one of their own, and
    make the three updates.
    """
    from megatron_dapo import checkpoint

    reports: dict[str, Any] = {}
    for run in runs:
        with open_policy(run, f"{folder}/{run.name}.store") as policy:
            if policy is None:
                continue
            saved = checkpoint.find(Path(folder) / saved_by[run.name], "auto")
            assert saved is not None
            checkpoint.load(saved, policy)
            checkpoint.save(Path(folder) / run.name, policy, _state(policy), keep=1)
            reports[run.name] = _go_on(policy, Path(folder) / run.name)
    return reports


def _go_on(policy: Any, folder: Path) -> list[list[float]]:
    """Loss, gradient norm and learning rate of each update; the weights after all of them as `folder/hf`."""
    results = [_update(policy, 2 + number) for number in range(UPDATES)]
    export(policy, folder / "hf")
    return [[result.loss, result.grad_norm, result.lr] for result in results]


def _update(policy: Any, number: int) -> Any:
    whole = plan(make_samples(), policy.session.layout, num_updates=2, budget="half")
    return policy.update(part_of(policy, whole), number % 2)


def _state(policy: Any) -> RunState | None:
    return RunState(step=2, rollouts={}) if policy.session.rank == 0 else None


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, read by torch alone, in this process."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
