"""`bench.py checkpoint`: how long a save keeps one rank from training (see tools/bench.py)."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_rank import one_rank_policy
from benchmarks.padding import make_sample
from megatron_dapo import checkpoint
from megatron_dapo.batching.packing import pack
from megatron_dapo.checkpoint_writer import CheckpointWriter
from megatron_dapo.objectives.base import trained_tokens
from megatron_dapo.types import Batch

WARMUP = 3  # from the third save on Megatron's plan is kept


def run(options: argparse.Namespace) -> dict[str, Any]:
    policy = one_rank_policy(options.model, options.tokens, options.overrides)
    batch = _batch(options.tokens)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        return _measure(policy, batch, Path(name), options.saves)


def _batch(tokens: int) -> Batch:
    sample = make_sample(tokens, random.Random(0))
    return pack([sample], dp=1, num_updates=1, max_tokens=tokens, version=0, denominator=trained_tokens)


def _measure(policy: Any, batch: Batch, folder: Path, saves: int) -> dict[str, Any]:
    waiting, behind = (CheckpointWriter(policy.session, in_background=mode) for mode in (False, True))
    alone = _updates_until(policy, batch, lambda number: number >= 5)
    rounds = [_round(policy, batch, folder, waiting, behind, 2 * k) for k in range(1, WARMUP + saves + 1)]
    seconds = {key: statistics.median(measured[key] for measured in rounds[WARMUP:]) for key in rounds[0]}
    return {
        "bytes": _size(folder),
        **{f"{key}_seconds": round(value, 4) for key, value in seconds.items()},
        "update_alone_seconds": round(statistics.median(alone), 4),
        "blocked_over_waiting": round(seconds["blocked"] / seconds["waiting"], 3),
    }


def _round(
    policy: Any, batch: Batch, folder: Path, waiting: CheckpointWriter, behind: CheckpointWriter, step: int
) -> dict[str, float]:
    """One save that training waits for, one in the background beside updates, and copies of as many bytes."""
    measured = {}
    began = time.perf_counter()
    _save(waiting, policy, folder, step)
    measured["waiting"] = time.perf_counter() - began
    os.sync()
    began = time.perf_counter()
    path = _save(behind, policy, folder, step + 1)
    measured["blocked"] = time.perf_counter() - began
    beside = _updates_until(policy, batch, lambda _: path.is_dir())
    measured["until_complete"] = time.perf_counter() - began
    behind.finish()
    os.sync()
    return measured | _copies(_size(folder), folder) | {"update_beside": statistics.median(beside)}


def _save(writer: CheckpointWriter, policy: Any, folder: Path, step: int) -> Path:
    state = checkpoint.RunState(step=step, rollouts={})
    return checkpoint.save(folder, policy, state, keep=1, writer=writer)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("checkpoints/*/*"))


def _updates_until(policy: Any, batch: Batch, done: Any) -> list[float]:
    """Seconds of each update, one after another until `done`, which is asked with their number."""
    seconds: list[float] = []
    while not done(len(seconds)):
        began = time.perf_counter()
        policy.update(batch, 0)
        seconds.append(time.perf_counter() - began)
    return seconds


def _copies(size: int, folder: Path) -> dict[str, float]:
    """Seconds of one copy of `size` bytes to memory that was used before, and of one to a flushed file."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    target.copy_(source)
    seconds = {"memory_copy": time.perf_counter() - began}
    file = folder / "plain"
    began = time.perf_counter()
    with open(file, "wb") as stream:
        stream.write(target.numpy().data)
        os.fsync(stream.fileno())
    seconds["file_copy"] = time.perf_counter() - began
    file.unlink()
    return seconds
