"""Rollout files are written behind the run: only the disk loses one, and little is held."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.samples import make_group, make_prompt

from megatron_dapo.report import writer
from megatron_dapo.report.rollouts import load_groups, rollout_path, save_groups
from megatron_dapo.report.writer import RolloutWriter


def groups_of(step: int) -> list:
    return [make_group(make_prompt(10 * step + i)) for i in range(2)]


def make_writer(run_dir, said=None, *, keep=None, resume_step=None) -> RolloutWriter:
    say = print if said is None else said.append
    return RolloutWriter(run_dir, keep=keep, resume_step=resume_step, say=say)


def names(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "rollouts").iterdir())


def test_closing_writes_what_was_put(tmp_path):
    rollouts = make_writer(tmp_path)
    for step in (1, 2, 3):
        rollouts.put(step, groups_of(step), {"num_updates": step})
    rollouts.close()
    rollouts.close()
    for step in (1, 2, 3):
        loaded, header = load_groups(rollout_path(tmp_path, step))
        assert loaded == groups_of(step)
        assert (header["step"], header["meta"]) == (step, {"num_updates": step})


@pytest.mark.parametrize(("keep", "stay"), [(2, [4, 5]), (9, [1, 2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_newest_files_stay(tmp_path, keep, stay):
    rollouts = make_writer(tmp_path, keep=keep)
    for step in range(1, 6):
        rollouts.put(step, groups_of(step), {})
    rollouts.close()
    assert names(tmp_path) == [f"step_{step:06d}.parquet" for step in stay]


class Disk:
    """save_groups that waits until a write is let through, and fails when told to."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.error: Exception | None = None
        monkeypatch.setattr(writer, "save_groups", self)

    def __call__(self, path, groups, step, meta) -> None:
        self.begun.release()
        self.let.acquire()
        if self.error:
            raise self.error
        save_groups(path, groups, step, meta)


def test_flush_waits_until_all_that_was_put_is_on_disk(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    rollouts = make_writer(tmp_path)
    for step in (1, 2):
        rollouts.put(step, groups_of(step), {})
    flush = threading.Thread(target=rollouts.flush)
    flush.start()
    disk.let.release()
    assert disk.begun.acquire(timeout=30) and disk.begun.acquire(timeout=30)  # the second is being written
    flush.join(0.05)
    assert flush.is_alive()
    disk.let.release()
    flush.join(30)
    assert not flush.is_alive() and names(tmp_path) == ["step_000001.parquet", "step_000002.parquet"]
    disk.let.release(2)
    for step in (3, 4):  # there is room as before
        rollouts.put(step, groups_of(step), {})
    rollouts.close()
    assert len(names(tmp_path)) == 4


def test_the_trainer_waits_for_a_slow_disk_and_no_more_than_two_steps_are_held(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    clock = iter([10.0, 10.0, 20.0, 20.0, 30.0, 37.0])  # read before and after each wait
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=clock.__next__))
    rollouts = make_writer(tmp_path)
    waited = [rollouts.put(step, groups_of(step), {}) for step in (1, 2)]
    third = threading.Thread(target=lambda: waited.append(rollouts.put(3, groups_of(3), {})))
    third.start()
    disk.begun.acquire()
    third.join(0.2)
    assert third.is_alive() and len(waited) == 2  # one is being written, one is queued, the third waits
    disk.let.release(3)
    third.join()
    rollouts.close()
    assert waited == [0.0, 0.0, 7.0]
    assert len(names(tmp_path)) == 3


def test_groups_are_forgotten_once_they_are_written(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    rollouts = make_writer(tmp_path)

    class Groups(list):
        pass

    groups = Groups(groups_of(1))
    gone = weakref.ref(groups)
    rollouts.put(1, groups, {})
    del groups
    disk.let.release()
    rollouts.put(2, groups_of(2), {})
    for _ in range(2):
        disk.begun.acquire()  # the second write has begun
    gc.collect()
    assert gone() is None
    disk.let.release()
    rollouts.close()


def test_a_full_disk_is_told_once_and_the_next_steps_are_tried(tmp_path, monkeypatch):
    def save(path, groups, step, meta) -> None:
        if step in (2, 3, 5):
            raise OSError(28, "No space left on device")
        save_groups(path, groups, step, meta)

    monkeypatch.setattr(writer, "save_groups", save)
    said: list[str] = []
    rollouts = make_writer(tmp_path, said)
    for step in range(1, 6):
        rollouts.put(step, groups_of(step), {})
    rollouts.close()
    assert names(tmp_path) == ["step_000001.parquet", "step_000004.parquet"]
    first, second, lost = said
    assert "rollouts of step 2 could not" in first and "No space left on device" in first
    assert "report.keep_rollouts" in first and "report.rollouts=false" in first
    assert "rollouts of step 5 could not" in second
    assert "steps 2, 3, 5" in lost


def test_a_new_run_moves_the_rollouts_of_another_away(tmp_path):
    for _ in range(3):
        rollouts = make_writer(tmp_path, keep=1)
        rollouts.put(7, groups_of(7), {})
        rollouts.close()
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["rollouts", "rollouts.0", "rollouts.1"]
    assert [len(list((tmp_path / folder).iterdir())) for folder in folders] == [1, 1, 1]


def test_a_resumed_run_removes_the_steps_that_run_again_and_what_a_kill_left(tmp_path):
    rollouts = make_writer(tmp_path)
    for step in (1, 2, 3):
        rollouts.put(step, groups_of(step), {})
    rollouts.close()
    (tmp_path / "rollouts" / "step_000004.parquet.tmp").write_bytes(b"half")
    (tmp_path / "rollouts" / "notes.txt").write_text("mine")
    make_writer(tmp_path, resume_step=3).close()
    assert names(tmp_path) == ["notes.txt", "step_000001.parquet", "step_000002.parquet"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from support.samples import make_group, make_prompt
from megatron_dapo.report import rollouts
from megatron_dapo.report.writer import RolloutWriter

encode, count = rollouts._encode, 0
def killed_in_the_second(rows, schema):
    global count
    count += 1
    if count > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(rows, schema)
rollouts._encode, rollouts.ROWS = killed_in_the_second, 4
writer = RolloutWriter(Path({run_dir!r}), keep=None, resume_step=None, say=print)
writer.put(1, [make_group(make_prompt(i)) for i in range(2)], {{}})
writer.close()
"""


def test_a_kill_leaves_no_half_file_under_the_final_name(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parents[1]), run_dir=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step_000001.parquet.tmp"]
    make_writer(tmp_path, resume_step=1).close()
    assert names(tmp_path) == []
