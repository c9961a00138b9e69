"""A conversion that is killed at any moment goes on where it was, and never leaves a half target."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.convert_runs import FAMILIES, assert_bit_equal, make, sparse_model, weights

from megatron_dapo.convert import compare, workers
from megatron_dapo.convert.job import Job

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
KILLS = 20


def fork(job: Job) -> multiprocessing.process.BaseProcess:
    """The conversion in a process of its own, at once."""
    process = multiprocessing.get_context("fork").Process(target=workers.convert, args=(job, 1, {}))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_killed_at_random_points(tmp_path, to):
    model = make(tmp_path / "model", FAMILIES["qwen2_32b"], 0)
    source = model
    if to == "hf":
        source = tmp_path / "megatron"
        workers.convert(Job(to="megatron", source=model, hf_source=model, out=source), environment={})
    job = Job(to=to, source=source, hf_source=model, out=tmp_path / "out", shard_bytes=20_000)
    chance, kills, whole_s, done = random.Random(0), 0, 1.0, 0
    while kills < KILLS or not job.out.exists():
        began = time.monotonic()
        process = fork(job)
        process.join(chance.uniform(0, whole_s) if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            whole_s = time.monotonic() - began
        if job.out.exists():
            assert not job.partial.exists() and compare.compare(job.out, model).equal
            if kills < KILLS:
                job.out.rename(tmp_path / f"done-{done}")
                done += 1
    if to == "hf":
        assert_bit_equal(weights(job.out), weights(model))


@pytest.mark.slow
def test_worker_processes_end_with_the_one_that_is_killed(tmp_path):
    model, out = sparse_model(tmp_path / "model", layers=2, vocab=32_000), tmp_path / "out"
    command = [sys.executable, str(TOOL), "hf-to-megatron", "--hf", str(model), "--out", str(out)]
    command += ["--shard-bytes", "20000000", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("out.partial/.convert/*.distcp.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/release/*")}
    assert files and not out.exists()
    time.sleep(1)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/release/*")}
    assert subprocess.run(command, env=env, stderr=subprocess.DEVNULL, timeout=300).returncode == 0
    assert compare.compare(out, model).equal
