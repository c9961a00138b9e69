"""Rollout files written behind the run: one thread, a bounded queue, the newest files kept.

writer = RolloutWriter(run_dir, keep=20, resume_step=None, say=print)
waited_s = writer.put(step, groups, meta)
writer.close()
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.report.lines import unused_name
from megatron_dapo.report.rollouts import rollout_path, save_groups
from megatron_dapo.types import Group

# Steps in memory at most, the one that is being written included. At 512 x 16 responses of 5,000 tokens a
# step is 0.35 GB; a second one lets a single slow write pass unnoticed.
PENDING = 2

Job = tuple[int, Sequence[Group], dict[str, Any]]


class RolloutWriter:
    """`keep`: files that stay, the newest; None: all. `say`: called with a sentence for the console, from the
    writer's thread too.

    `resume_step` is None for a new run, which moves another run's rollouts/ in the same folder to
    rollouts.0/; otherwise files of this step and later ones, which run again, are removed.
    """

    def __init__(
        self, run_dir: Path, *, keep: int | None, resume_step: int | None, say: Callable[[str], None]
    ) -> None:
        self._run_dir, self._keep, self._say = run_dir, keep, say
        self._lost: list[int] = []  # steps whose file could not be written
        self._failing = False  # the newest write failed, and that was said
        prepare_folder(rollout_path(run_dir, 0).parent, resume_step)
        self._room = threading.Semaphore(PENDING)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="rollout-writer", daemon=True)
        self._thread.start()

    def put(self, step: int, groups: Sequence[Group], meta: dict[str, Any]) -> float:
        """Have a step written; returns the seconds waited because PENDING steps were not on disk yet."""
        began = time.monotonic()
        self._room.acquire()
        self._jobs.put((step, groups, meta))
        return time.monotonic() - began

    def flush(self) -> None:
        """Return when everything that was put is on disk, or was reported as lost."""
        for _ in range(PENDING):
            self._room.acquire()
        self._room.release(PENDING)

    def close(self) -> None:
        """Return when everything is on disk, or was reported as lost. May be called twice."""
        if not self._thread.is_alive():
            return
        self._jobs.put(None)
        self._thread.join()
        if self._lost:
            steps = ", ".join(map(str, self._lost))
            self._say(f"no rollouts were written for steps {steps}: tools/replay.py cannot train on them")

    def _write_all(self) -> None:
        # The job is a local of _write, gone when the room is given back: the bound holds for memory.
        while self._write():
            self._room.release()

    def _write(self) -> bool:
        job = self._jobs.get()
        if job is None:
            return False
        step, groups, meta = job
        path = rollout_path(self._run_dir, step)
        try:
            save_groups(path, groups, step, meta)
            self._remove_old(path.parent)
            self._failing = False
        except Exception as error:  # whatever it is, the run goes on without this file
            self._lost.append(step)
            if not self._failing:
                self._say(
                    f"the rollouts of step {step} could not be written to {path.parent} ({error}); training "
                    "goes on without them. Free space there, keep fewer with report.keep_rollouts, or switch "
                    "them off with report.rollouts=false"
                )
            self._failing = True
        return True

    def _remove_old(self, folder: Path) -> None:
        if self._keep is not None:
            for _, path in sorted(rollout_files(folder).items())[: -self._keep]:
                path.unlink(missing_ok=True)


def rollout_files(folder: Path) -> dict[int, Path]:
    """The rollout files of a folder by step."""
    found = ((re.fullmatch(r"step_(\d+)\.parquet", path.name), path) for path in folder.glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def prepare_folder(folder: Path, resume_step: int | None) -> None:
    """Make room for a run's rollouts: move another run's away, or remove those of steps that run again. What
    a kill left unfinished goes too.
    """
    if resume_step is None and folder.exists() and any(folder.iterdir()):
        folder.rename(unused_name(folder))
    for path in folder.glob("*.tmp"):
        path.unlink()
    for step, path in rollout_files(folder).items():
        if resume_step is not None and step >= resume_step:
            path.unlink()
