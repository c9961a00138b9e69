"""Runs that are stopped, killed or starved, or that cannot go on.

Sampling is seeded, so one finished run is the reference for every run that is disturbed: the disturbance must
not show in the metrics.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil
import pytest
import torch
from support.runs import STEPS, Run, assert_steps_equal, metrics, overrides, resume, started

pytestmark = pytest.mark.timeout(1800)  # a busy machine needs minutes for a server's start alone


def test_stopped_killed_and_without_its_engine_a_run_goes_on_exactly(finished, place):
    """SIGTERM in the middle of step 2; resumed, kill -9 of the launcher in the middle of step 3; resumed,
    kill -9 of the engine while it generates for step 4, and Ctrl-C after the steps that are compared: nothing
    shows and nothing is left.
    """
    run_dir = place.folder / "disturbed"
    with resume(place, run_dir, "disturbed_1.log", hold=f"{run_dir} 1") as run:
        run.until((run_dir / "held").exists)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(120) == 0, run.text
        assert run.all_gone()
        assert "stopped after step 1; resume with" in run.text and "checkpoint.resume=auto" in run.text
        assert "Traceback" not in run.text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]

    (run_dir / "held").unlink()
    with resume(place, run_dir, "disturbed_2.log", hold=f"{run_dir} 2") as run:
        run.until((run_dir / "held").exists)
        assert len(run.named("vllm.entrypoints")) == 1 and len(run.named("megatron_dapo.train")) == 3
        run.process.kill()  # the launcher alone: ranks, engines and grading workers must end by themselves
        run.process.wait()
        assert run.all_gone()
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]

    with resume(place, run_dir, "disturbed_3.log", run__max_steps=1000) as run:
        run.until(lambda: len(metrics(run_dir)) >= 3)
        kill_engine(run)
        run.until(lambda: metrics(run_dir)[-1]["step"] >= STEPS)
        assert "step_000002" in run.text and "engine_0 is started again" in run.text
        # what a terminal does on Ctrl-C: to the launcher and to every rank
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(120) == 0, run.text
        assert run.all_gone()
        assert "SIGINT" in run.text and "resume with" in run.text and "Traceback" not in run.text
    last = metrics(run_dir)[-1]["step"]
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, last + 1))
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "run.pt").exists()
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_kill_9_of_every_process_resumes_exactly(finished, place):
    run_dir = place.folder / "killed"
    with resume(place, run_dir, "killed_1.log", hold=f"{run_dir} 2") as run:
        run.until((run_dir / "held").exists)
        run.kill()
    with resume(place, run_dir, "killed_2.log") as run:
        assert run.wait() == 0, run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_previous_checkpoint(finished, place):
    """In the background, killed as soon as the temporary folder of the second checkpoint is there."""
    run_dir = place.folder / "killed_saving"
    with resume(place, run_dir, "saving_1.log", checkpoint__async_save=True) as run:
        run.until((run_dir / "checkpoints" / "step_000002.tmp").exists)
        run.kill()
    assert (run_dir / "checkpoints" / "step_000001" / "run.pt").exists()
    with resume(place, run_dir, "saving_2.log", checkpoint__async_save=True) as run:
        assert run.wait() == 0, run.text
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == [f"step_{step:06d}" for step in range(1, STEPS + 1)]
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


def kill_engine(run: Run) -> None:
    """kill -9 of a vLLM server in the middle of a generation: its workers are frozen first, so that requests
    are open.
    """
    [server] = run.named("vllm.entrypoints")
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.suspend()
    time.sleep(1.0)
    server.kill()


@pytest.mark.slow
def test_an_engine_killed_between_generation_and_push(finished, place):
    """Step 2 is sampled in one wave, and held in grading while its engine dies: the death shows in the push
    after the update.
    """
    run_dir = place.folder / "push_killed"
    with resume(place, run_dir, "push_killed.log", hold=f"{run_dir} 1") as run:
        run.until((run_dir / "held").exists)
        time.sleep(5)  # the whole wave
        run.named("vllm.entrypoints")[0].kill()
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert "engine_0 failed while" in run.text and "engine_0 is started again" in run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


def test_one_of_two_engines_dies_and_the_other_finishes_the_step(finished, place):
    """No restart is allowed, so the steps after the death are the survivor's alone: the same in every bit."""
    run_dir = place.folder / "one_of_two"
    values = {"rollout__engines": 2, "rollout__max_restarts": 0}
    with resume(place, run_dir, "one_of_two.log", hold=f"{run_dir} 1", **values) as run:
        run.until((run_dir / "held").exists)
        assert len(run.named("vllm.entrypoints")) == 2
        run.named("vllm.entrypoints")[0].kill()
        (run_dir / "release").touch()
        assert run.wait() == 0, run.text
        assert run.all_gone()
        assert "is left out" in run.text and "the run goes on with 1 of 2 engines" in run.text
    assert_steps_equal(run_dir, finished, range(1, STEPS + 1))


@pytest.mark.slow
def test_engines_that_keep_dying_end_the_run_with_its_checkpoint(place):
    run_dir = place.folder / "dying"
    with resume(place, run_dir, "dying.log", rollout__max_restarts=0, run__max_steps=1000) as run:
        run.until(lambda: metrics(run_dir))
        kill_engine(run)
        assert run.wait(120) == 1
        assert run.all_gone()
        assert "rollout.max_restarts=0 is used up" in run.text and "Traceback" not in run.text
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "run.pt").exists()


@pytest.mark.slow
def test_an_engine_that_cannot_start_ends_the_run_with_its_words(place):
    run_dir = place.folder / "no_engine"
    arguments = overrides(place.model, place.data, run_dir, **{"rollout__extra_args": "[--no-such-flag]"})
    with started(arguments, place.data, place.folder / "no_engine.log") as run:
        assert run.wait(300) == 1
        assert run.all_gone()
    assert "unrecognized arguments: --no-such-flag" in run.text and "engine_0.log" in run.text
    assert "Traceback" not in run.text


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch(place):
    """A learning rate of 1e30 makes the second update of the first step overflow."""
    run_dir = place.folder / "overflow"
    arguments = overrides(place.model, place.data, run_dir, optimizer__lr=1e30, batch__updates_per_step=2)
    with started(arguments, place.data, place.folder / "overflow.log") as run:
        assert run.wait() == 1
        assert run.all_gone()
    assert "nan" in run.text or "inf" in run.text
    assert "Traceback" not in run.text
    assert "failed_batch_step_000001.pt" in run.text
    batch = torch.load(run_dir / "failed_batch_step_000001.pt", weights_only=False)
    assert len(batch.mini_batches) == 2 and len(batch.lengths) == 16
    assert not (run_dir / "hf").exists() and not metrics(run_dir)
